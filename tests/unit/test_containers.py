"""The Dockerfiles name what is there. They are not built here: that takes Docker and a network."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT

DOCKERFILES = sorted((ROOT / "containers").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, with continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, rest in re.findall(r"^([A-Z]+) (.+)$", joined, re.MULTILINE)]


def is_sent(source: str) -> bool:
    """Tell whether a file or folder of the repository gets past .dockerignore."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    sent = True
    for pattern in patterns:
        if fnmatch(source, pattern.removeprefix("!")):
            sent = pattern.startswith("!")
    return sent


def test_there_is_an_image_for_each_environment():
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".gpu", ".vllm"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_and_installs_is_there(path: Path):
    found = instructions(path)
    copied: dict[str, str] = {}
    for name, rest in found:
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert is_sent(source.rstrip("/")), f"{source} is left out by .dockerignore"
                copied[source.rstrip("/")] = target
        for requirements in re.findall(r"-r /opt/cachelora/(\S+)", rest):
            assert (ROOT / requirements).is_file(), requirements
            assert "requirements" in copied, "installed before it is copied"
    # What pip needs to build the package, by pyproject.toml.
    assert {"pyproject.toml", "README.md", "LICENSE", "src"} < set(copied)
    runs = " ".join(rest for name, rest in found if name == "RUN")
    assert runs.endswith("pip install --no-cache-dir --no-deps /opt/cachelora")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_what_every_job_needs(path: Path):
    found = instructions(path)
    runs = " ".join(rest for name, rest in found if name == "RUN")
    named = set(re.findall(r"-r /opt/cachelora/requirements/(\S+)", runs))
    environment = {"vllm.txt"} if path.suffix == ".vllm" else {"base.txt", "llamacpp.txt", "ollama.txt", "openai.txt"}
    assert named == environment | {"s3.txt", "gcs.txt"}
    # Snakemake runs itself in each job, and Google's runs `cd /work`: profiles/googlebatch.
    assert (
        "snakemake==" in (ROOT / f"requirements/{'vllm-workflow' if 'vllm.txt' in named else 'base'}.txt").read_text()
    )
    names = [name for name, _ in found]
    assert ("WORKDIR", "/work") in found and "install --directory --owner cachelora /work" in runs
    assert ("USER", "cachelora") in found and names.index("USER") > max(
        index for index, name in enumerate(names) if name in ("RUN", "COPY")
    )
    # Executors bring the command; an entry point would swallow that of AWS Batch.
    assert "ENTRYPOINT" not in names


def test_the_cpu_image_has_the_torch_that_is_pinned():
    torch = re.search(r"^torch==\S+", (ROOT / "requirements/base.txt").read_text(), re.MULTILINE)
    assert torch and torch[0] in (ROOT / "containers/Dockerfile.cpu").read_text()
