"""What the tests share: the base model, and copies of the workflow to run and to damage."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cachelora.config import BaseModelSource, Config, parse

ROOT = Path(__file__).parent.parent
# No network at test time, also in the processes that the tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tests run in several processes: threads of theirs would wait for one another in busy loops.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often a training is killed before it may end")


@pytest.fixture(scope="session")
def default_config() -> Config:
    import yaml

    return parse(yaml.safe_load((ROOT / "config/domains.yaml").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def base(default_config: Config) -> BaseModelSource:
    return default_config.base_models["minilm-l6"]


@dataclass
class Workflow:
    """A copy of the workflow, with a copy of the library that its jobs import."""

    folder: Path

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """Return the command line and environment of a run."""
        env = os.environ | {"PYTHONPATH": str(self.folder / "src")}
        return [sys.executable, "-m", "snakemake", "--cores", "2", "--max-threads", "1", *arguments], env

    def run(self, *arguments: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
        """Run Snakemake, its output as one text in stdout."""
        command, env = self.command(*arguments)
        return subprocess.run(
            command, cwd=self.folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=timeout, check=False,
        )  # fmt: skip

    def planned(self, *arguments: str) -> set[str]:
        """Return the messages of the jobs that a run would run."""
        result = self.run("-n", *arguments)
        assert result.returncode == 0, result.stdout
        said = re.sub(r" \(progress: [^)]*\)", "", result.stdout)
        return set(re.findall(r"^Job \d+: (.+)$", said, flags=re.MULTILINE))

    def edit(self, path: str, change: Callable[[str], str]) -> None:
        """Change a text file of the copy."""
        file = self.folder / path
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


def copy_workflow(folder: Path) -> Workflow:
    for name in ("Snakefile", "config", "data", "envs", "profiles", "src", "workflow"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, folder / name)
    return Workflow(folder)


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    """A fresh copy for one test."""
    return copy_workflow(tmp_path)
