"""What the tests share: the base model, and copies of the workflow to run and to damage."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from cachelora.config import BaseModelSource, Config, parse
from cachelora.models import base_folder

ROOT = Path(__file__).parent.parent
KEY = "sk-averysecretkey"
"""An API key that must not turn up anywhere."""
# No network at test time, also in the processes that the tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tests run in several processes: threads of theirs would wait for one another in busy loops.
os.environ["OMP_NUM_THREADS"] = "1"
# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("cachelora", deadline=None)
hypothesis.settings.load_profile("cachelora")


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
    python: str = sys.executable

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """Return the command line and environment of a run."""
        env = os.environ | {"PYTHONPATH": str(self.folder / "src")}
        return [self.python, "-m", "snakemake", "--cores", "2", "--max-threads", "1", *arguments], env

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


def ask_ten_queries(workflow: Workflow, engine: str) -> None:
    """Send the first ten queries of a domain through an engine, from config alone, and see that nothing is missing.

    Then replay the recording of that run, and see that it gives the same file, byte for byte.
    """
    (workflow.folder / "ten.yaml").write_text(
        "domains: {law: null, programming: null, psychology: null, general: null}\n"
        "queries: {max_queries: 10}\n"
        f"engines: {{tried: {engine}}}\n"
        "augment: {engine: tried, paraphrases: 2, negatives: 2, max_chars: 60, max_failed_share: 1.0, shards: 2}\n"
    )
    arguments = ("--configfile", "ten.yaml", "--", "results/augmented/medical.parquet")
    result = workflow.run(*arguments)
    assert result.returncode == 0, result.stdout
    results = workflow.folder / "results"
    journal = [
        json.loads(line) for path in (results / "state").rglob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len({reply["query_id"] for reply in journal}) == len(journal) == 10
    summaries = [json.loads((results / f"augmented/medical/{shard}.json").read_text()) for shard in range(2)]
    assert sum(sum(summary["queries"].values()) for summary in summaries) == 10
    for summary in summaries:
        texts = sum(summary["texts"].values()) + sum(summary["refused"].values())
        assert texts >= 3 * sum(summary["queries"].values())
        assert summary["tokens"]["prompt"] > 100 * sum(summary["queries"].values())
        assert summary["tokens"]["reply"] > 10 * sum(summary["queries"].values())
        assert summary["run"]["asked"] == sum(summary["queries"].values()) and summary["run"]["seconds"] > 0
        assert summary["engine"].split()[1][0].isdigit()
    assert not workflow.planned(*arguments)

    live = (results / "augmented/medical.parquet").read_bytes()
    (workflow.folder / "shared.jsonl").write_bytes((results / "augmented/medical.jsonl").read_bytes())
    (workflow.folder / "replay.yaml").write_text(
        "pathvars: {results: replayed}\ndomains: {medical: {recording: shared.jsonl, engine: recorded}}\n"
    )
    result = workflow.run("--configfile", "ten.yaml", "replay.yaml", "--", "replayed/augmented/medical.parquet")
    assert result.returncode == 0, result.stdout
    assert (workflow.folder / "replayed/augmented/medical.parquet").read_bytes() == live
    assert (workflow.folder / "replayed/augmented/medical.jsonl").read_bytes() == (
        workflow.folder / "shared.jsonl"
    ).read_bytes()


def save_cross_encoder(folder: Path, base: BaseModelSource, labels: list[str]) -> None:
    """Save a small BERT with random weights and the base model's vocabulary, as a cross-encoder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(base_folder(base))
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={name: n for n, name in enumerate(labels)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_key(folder: Path) -> list[Path]:
    """List the files that hold the API key."""
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
