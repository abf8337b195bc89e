"""Every preset is planned, and what is wrong with a configuration or a file is said in a line or two."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import pairwise

import pytest
import yaml
from conftest import ROOT

from cachelora.config import ENGINES, engine_type
from cachelora.models import base_folder

PRESETS = sorted(path.stem for path in (ROOT / "config/presets").glob("*.yaml"))


def test_default_plan_has_every_stage(workflow):
    planned = workflow.planned()
    for domain in ("medical", "law", "programming", "psychology"):
        assert f"Training the adapter {domain} on minilm-l6." in planned
        assert f"Replaying the recorded augmentation of {domain}, shard 0." in planned
        assert f"Filtering what was written for {domain}." in planned
    assert "Training the adapter joint on minilm-l6." in planned
    assert "Merging joint into minilm-l6, for use without peft." in planned
    # Everyday queries: pooled and tested on, without an adapter of their own.
    assert "Grouping the triplets of general." in planned
    assert "Training the adapter general on minilm-l6." not in planned
    assert len(planned) == 51


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_planned(workflow, preset):
    mirror = ROOT.parent / "shared/data/labelled"
    if preset == "public" and not mirror.is_dir():
        pytest.skip("the public labelled sets are not on this machine")
    config = ("--config", f"mirror={mirror}") if preset == "public" else ()
    planned = workflow.planned("--configfile", f"config/presets/{preset}.yaml", *config)
    assert ("Reading the test set seeds-five." in planned) == (preset == "public")
    sweeps = preset in ("ablations", "sweep")
    assert ("Writing the benchmark table." in planned) != sweeps
    assert ("Comparing the trials on minilm-l6." in planned) == sweeps
    if preset == "llamacpp":
        assert "Augmenting law, shard 0, with llama.cpp." in planned
        assert not any(message.startswith("Replaying") for message in planned)
    for engine, how in (("vllm", "with vLLM"), ("openai", "by a server"), ("ollama", "by Ollama")):
        assert (f"Augmenting law, shard 0, {how}." in planned) == (preset == engine)
    if preset == "full":
        assert "Training the adapter joint on minilm-l12." in planned


def test_sets_and_an_adapter_of_other_peoples_making_are_measured(workflow, base):
    """From a mirror, and from a folder without a manifest, to the scores."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(base_folder(base)), lora).save_pretrained(workflow.folder / "elsewhere")
    rows = [{"a": "symptoms of gout", "b": "signs of podagra", "label": 1}, {"a": "gout", "b": "flu", "label": 0}]
    (workflow.folder / "mirror").mkdir()
    (workflow.folder / "mirror/mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tests = (workflow.folder / "data/medical/test.jsonl").read_text().splitlines(keepends=True)
    (workflow.folder / "few.jsonl").write_text("".join(tests[:20]))
    (workflow.folder / "mine.yaml").write_text(
        "mirror: mirror\n"
        "domains: {law: null, programming: null, psychology: null, general: null, medical: {test: few.jsonl}}\n"
        "sets: {mine: {source: nowhere/mine.jsonl}}\n"
        "adapters: {theirs: {source: elsewhere}}\n"
        "evaluate: {bootstrap: 100}\n"
    )
    target = "results/evaluation/minilm-l6/theirs.json"
    result = workflow.run("--configfile", "mine.yaml", "--", target)
    assert result.returncode == 0, result.stdout
    found = json.loads((workflow.folder / target).read_text())
    margins = {row["test_set"]: row for row in found["results"] if (row["metric"], row["kind"]) == ("margin", "all")}
    assert {name: row["n"] for name, row in margins.items()} == {"medical": 20, "mine": 2}
    assert all(row["change"] != 0 for row in margins.values())
    assert "no manifest vouches for it" in (workflow.folder / "logs/evaluate/minilm-l6/theirs.log").read_text()
    (workflow.folder / "mirror/mine.jsonl").unlink()
    said = explain(workflow.run("-n", "--configfile", "mine.yaml"))
    assert "sets.mine.source: no such file: nowhere/mine.jsonl. Put it there, correct the path, or name the" in said


def test_a_domain_without_a_test_file_is_planned(workflow):
    workflow.edit("config/domains.yaml", lambda text: text.replace("    test: data/law/test.jsonl\n", ""))
    assert "Holding out the test set of law from its own queries." in workflow.planned()


def explain(result):
    """Return the lines with which a failed run explains itself, and check that it failed."""
    assert result.returncode != 0, result.stdout
    assert "Traceback (most recent call last)" not in result.stdout
    return result.stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 13", "sede: 13", "sede: unknown key 'sede'"),
        (
            "    field: law\n",
            "    felid: law\n",
            "domains.law.felid: unknown key 'felid'. Use one of queries, recording",
        ),
        ("  law:\n", "  ../law:\n", "'../law' is no name"),
        ("  law:\n", "  joint:\n", "'joint' is reserved"),
        ("type: recorded", "type: gpt", "engines.recorded.type: unknown engine 'gpt'. Use 'recorded', 'llamacpp'"),
        ("    field: law\n", "    engine: gpt\n", "domains.law.engine: unknown engine 'gpt'"),
        ("data/law/queries.jsonl", "data/law/nope.jsonl", "domains.law.queries: no such file: data/law/nope.jsonl"),
    ],
)
def test_a_wrong_config_stops_before_anything_runs(workflow, old, new, message):
    workflow.edit("config/domains.yaml", lambda text: text.replace(old, new, 1))
    assert message in explain(workflow.run())
    assert not (workflow.folder / "results").exists()


GOOD = json.dumps({"query": "what is a tort"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b"", r"ERROR q\.jsonl: the file is empty\. Give at least one record\."),
        ("q.jsonl", f"{GOOD}\n{{oops\n".encode(), r"ERROR q\.jsonl, line 2: not JSON .*1 of 2 records are bad, more"),
        ("q.jsonl", b'{"question": "x"}\n', r"ERROR q\.jsonl, line 1: no key 'query' \(found: question\)"),
        ("q.jsonl", b'{"query": "caf\xe9"}\n', r"ERROR q\.jsonl, line 1: not UTF-8"),
        ("q.csv", b"question\nwhat is x\n", r"ERROR q\.csv, line 2: no key 'query' \(found: question\)"),
        ("q.parquet", b"PAR0", r"ERROR q\.parquet: not a readable Parquet file"),
        ("q.docx", b"x", r"ERROR q\.docx: unknown format '\.docx'\. Use one of \.csv, \.jsonl"),
    ],
)  # fmt: skip
def test_a_bad_query_file_stops_with_file_line_and_reason(workflow, name, content, message):
    (workflow.folder / name).write_bytes(content)
    workflow.edit("config/domains.yaml", lambda text: text.replace("data/law/queries.jsonl", name))
    said = explain(workflow.run("results/queries/law.parquet"))
    assert re.search(message, said), said
    assert not list((workflow.folder / "results").rglob("*.parquet"))


def test_bad_lines_are_set_aside_and_counted(workflow):
    path = workflow.folder / "data/law/queries.jsonl"
    path.write_bytes(path.read_bytes() + b"{oops\n")
    assert workflow.run("results/queries/law.parquet").returncode == 0
    (reject,) = (workflow.folder / "results/queries/law.rejects.jsonl").read_text().splitlines()
    lines = len(path.read_bytes().splitlines())
    assert json.loads(reject) == {"line": lines, "reason": json.loads(reject)["reason"], "text": "{oops"}
    assert "1 set aside" in (workflow.folder / "logs/queries/law.log").read_text()


def test_a_query_without_a_recording_names_the_engines(workflow):
    path = workflow.folder / "data/law/queries.jsonl"
    path.write_text(path.read_text() + '{"query": "something nobody recorded"}\n')
    said = explain(workflow.run("results/augmented/law.parquet"))
    assert "no recorded reply for 1 of" in said
    assert "'something nobody recorded'" in said
    assert "llamacpp" in said
    assert not (workflow.folder / "results/augmented/law.parquet").exists()


def test_paths_from_queries_are_never_used(workflow):
    path = workflow.folder / "data/law/queries.jsonl"
    nasty = "../../../../tmp/x'; touch pwned; echo $(touch pwned) {wildcards} %s"
    record = {"query": nasty, "paraphrases": [nasty + " again", "b c"], "negatives": [{"kind": "scope", "text": "d e"}],
              "model": "m", "prompt_version": "v"}  # fmt: skip
    some = path.read_text().splitlines()[:40]
    path.write_text("\n".join([*some, json.dumps({"query": nasty})]) + "\n")
    recording = workflow.folder / "data/law/augmented.jsonl"
    recording.write_text(recording.read_text() + json.dumps(record) + "\n")
    result = workflow.run("results/triplets/law.parquet")
    assert result.returncode == 0, result.stdout
    assert not list(workflow.folder.rglob("pwned"))


def test_two_gpu_jobs_never_run_at_once(workflow):
    """The default profile on a copy whose training only notes when it ran, with little to group before."""
    script = (
        "import time\nfrom pathlib import Path\n"
        "start = time.time()\ntime.sleep(1.5)\n"
        "for path in snakemake.output:\n    Path(path).write_text('x')\n"
        "Path(f'{snakemake.wildcards.model}.ran').write_text(f'{start} {time.time()}')\n"
    )
    (workflow.folder / "workflow/scripts/train.py").write_text(script)
    workflow.edit("workflow/rules/train.smk", lambda text: text.replace("threads: 8", "threads: 1"))
    targets = [f"results/tiny/models/minilm-l6/{name}/manifest.json" for name in ("law", "medical", "joint")]
    result = workflow.run("--configfile", "config/presets/tiny.yaml", "--", *targets)
    assert result.returncode == 0, result.stdout
    spans = sorted(tuple(map(float, path.read_text().split())) for path in workflow.folder.glob("*.ran"))
    assert len(spans) == 3
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_every_gpu_rule_asks_for_its_gpu_and_no_other_does():
    text = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    found = re.findall(
        r"^(?:use )?rule (\w+)(?: as (\w+) with)?:\n(.*?)(?=^rule |^use rule |\Z)", text, flags=re.MULTILINE | re.DOTALL
    )
    asking: dict[str, bool] = {}
    for first, second, body in found:
        # A rule that is made of another inherits its resources as a whole, or has its own.
        own = "    resources:" in body
        asking[second or first] = (
            bool(re.search(r"^\s+gpu=", body, re.MULTILINE)) if own or not second else asking[first]
        )
    live = {f"{stage}_{engine}" for stage in ("augment", "judge") for engine in ("llamacpp", "vllm")}
    assert {name for name, asks in asking.items() if asks} == {*live, "judge_cross_encoder", "train", "train_full"}


def test_rules_have_what_a_cluster_needs():
    text = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    for name, body in re.findall(r"^rule (\w+):\n(.*?)(?=^rule |\Z)", text, flags=re.MULTILINE | re.DOTALL):
        assert "    log:" in body, name
        assert "    message:" in body, name
        assert "    conda:" in body, name
        assert "code=stage_code(" in body, name
        if "localrule: True" not in body:
            assert "mem_mb=" in body and "runtime=" in body, name


def test_environments_hold_the_pinned_versions():
    pins = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            if "==" in (line := line.split("#")[0].strip()):
                name, version = line.split("==")
                pins.setdefault(name, {})["vllm" if path.stem.startswith("vllm") else "workflow"] = version
    for path in (ROOT / "envs").glob("*.yaml"):
        wanted = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
        for requirement in wanted:
            name, version = requirement.split("==")
            which = "vllm" if path.stem == "augment-vllm" else "workflow"
            assert pins[name][which] == version, f"{path.name}: {name}"


# Makes as if some modules were not installed.
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = {}
PathFinder.find_spec = classmethod(
    lambda cls, name, *where, **more: None if name.partition(".")[0] in hidden else find(name, *where, **more)
)
"""


def rules_by_environment():
    """Return the scripts that run in each environment."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "workflow/rules").glob("*.smk")))
    rules, scripts = {}, {}
    pattern = r"^(?:rule (\w+)|use rule (\w+) as (\w+) with):\n(.*?)(?=^rule |^use rule |\Z)"
    for name, origin, copy, body in re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL):
        environment = re.search(r"envs/([\w-]+)\.yaml", body)
        script = re.search(r"scripts/(\w+)\.py", body)
        inherited = rules.get(origin, (None, None))
        rules[name or copy] = (environment[1] if environment else inherited[0], script[1] if script else inherited[1])
    for environment, script in rules.values():
        scripts.setdefault(environment, set()).add(script)
    return scripts


def required(distribution, found):
    """Collect the distributions that one needs, by their names as an index spells them."""
    name = re.sub(r"[-_.]+", "-", distribution).lower()
    if name in found:
        return
    found.add(name)
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        if "extra ==" not in requirement:
            required(re.match(r"[\w.-]+", requirement)[0], found)


@pytest.mark.parametrize("environment", sorted(path.stem for path in (ROOT / "envs").glob("*.yaml")))
def test_scripts_import_nothing_that_their_environment_lacks(environment):
    listed = yaml.safe_load((ROOT / f"envs/{environment}.yaml").read_text())["dependencies"][-1]["pip"]
    there = {"cachelora"}
    for line in listed:
        required(line.split("==")[0], there)
    modules = metadata.packages_distributions()
    lacking = sorted(
        module
        for module, distributions in modules.items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions} & there
        # Test runners and installers hook into every process.
        and module.isidentifier()
        and not {"setuptools", "pip", "pytest", "coverage"} & set(distributions)
    )
    assert "hypothesis" in lacking
    scripts = [f"workflow/scripts/{name}.py" for name in sorted(rules_by_environment()[environment])]
    imported = {
        module
        for path in scripts
        for module in re.findall(r"^from (cachelora[\w.]*) import ", (ROOT / path).read_text(), flags=re.MULTILINE)
    }
    assert len(imported) > 2
    code = "\n".join([HIDE.format(lacking), *map("import {}".format, sorted(imported))])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_environment_gets_the_library_itself(workflow, tmp_path):
    environments = sorted((ROOT / "envs").glob("*.yaml"))
    scripts = [path.with_name(f"{path.stem}.post-deploy.sh").read_text() for path in environments]
    assert len(set(scripts)) == 1
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    path = os.pathsep.join([str(tmp_path / "venv/bin"), os.environ["PATH"]])
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, workflow.folder)
    subprocess.run(["bash", "-c", scripts[0]], cwd=workflow.folder, env=os.environ | {"PATH": path}, check=True)
    found = subprocess.check_output(
        ["python", "-c", "import cachelora; print(cachelora.__file__)"], cwd="/", env={"PATH": path}
    )
    assert str(tmp_path / "venv").encode() in found


def test_augmentation_needs_nothing_that_vllms_environment_lacks():
    """What is imported when the workflow is read, and by the jobs that run in that environment."""
    pinned = (ROOT / "requirements/vllm-workflow.txt").read_text()
    lacking = (
        "datasets",
        "faiss",
        "jinja2",
        "matplotlib",
        "peft",
        "rapidfuzz",
        "sentence_transformers",
        "snowballstemmer",
    )
    assert not [name for name in lacking if name.replace("_", "-") in pinned]
    rules = (ROOT / "workflow/rules/common.smk").read_text()
    scripts = [(ROOT / f"workflow/scripts/{name}.py").read_text() for name in ("augment", "judge", "gather")]
    imports = re.findall(r"^from cachelora\S* import .+$", "\n".join([rules, *scripts]), flags=re.MULTILINE)
    assert len(imports) > 10
    code = "\n".join(["import sys", *(f"sys.modules['{name}'] = None" for name in lacking), *imports])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_live_engine_has_what_it_takes_to_use_it():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rules = "".join((ROOT / f"workflow/rules/{stage}.smk").read_text() for stage in ("augment", "judge"))
    live = [name for engine in ENGINES if (name := engine_type(engine)) != "recorded"]
    for name in live:
        assert name in extras
        assert (ROOT / f"requirements/{name}.txt").is_file() and (ROOT / f"envs/augment-{name}.yaml").is_file()
        assert name in PRESETS
        assert f"rule augment_{name}:" in rules or f" as augment_{name} with:" in rules
        assert f" as judge_{name} with:" in rules
    assert {*extras} == {*live}


def test_links_in_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        text = page.read_text(encoding="utf-8")
        assert "@@" not in text, page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
