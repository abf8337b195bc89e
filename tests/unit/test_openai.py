"""The engine openai against a server that does everything wrong that a server can do."""

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cachelora.augment import OpenAI, augmented_table, query_live
from cachelora.config import Augment, OpenAIEngine
from cachelora.errors import EngineError

if not all(importlib.util.find_spec(name) for name in ("openai", "tenacity")):
    pytest.skip("openai and tenacity are not installed (requirements/openai.txt)", allow_module_level=True)

ASKED = Augment(paraphrases=2, negatives=2, max_chars=80)
QUERIES = [(f"{number:08x}00000000", f"query number {number}") for number in range(12)]
KEY = "sk-averysecretkey"


def content(task, query):
    texts = {
        "paraphrases": [f"{query} said so", f"{query} in other words"],
        "negatives": [{"kind": "aspect", "text": f"{query} but why"}, {"kind": "scope", "text": f"{query} here"}],
    }
    return json.dumps({task: texts[task]})


class Server(ThreadingHTTPServer):
    """Answers as it should, unless ``fault`` does something else: a function of handler, task, query and attempt."""

    daemon_threads = True

    def __init__(self, fault=None, port=0):
        self.fault = fault or (lambda *_: False)
        self.asked = Counter()
        self.bodies = []
        self.lock = threading.Lock()
        self.flying = self.most_flying = 0
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Clients that hang up are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def send(self, status, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, text):
        usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        self.send(200, head | {"choices": choices, "usage": usage})

    def refuse(self, status, message, **headers):
        self.send(status, {"error": {"message": message, "type": "x", "code": None}}, **headers)

    def do_GET(self):
        if not self.server.fault(self, "models", "", 1):
            self.send(200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        task = "negatives" if "negatives" in json.dumps(body.get("response_format", "")) + prompt else "paraphrases"
        query = prompt.split("<query>")[1].split("</query>")[0].strip()
        with self.server.lock:
            self.server.asked[task, query] += 1
            self.server.bodies.append(body)
            attempt = self.server.asked[task, query]
            self.server.flying += 1
            self.server.most_flying = max(self.server.most_flying, self.server.flying)
        try:
            if not self.server.fault(self, task, query, attempt):
                self.answer(content(task, query))
        finally:
            with self.server.lock:
                self.server.flying -= 1


@contextmanager
def serving(fault=None, port=0):
    server = Server(fault, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def engine(url, **changes):
    settings = {"type": "openai", "url": url, "model": "m", "timeout": 5, "attempts": 3, "concurrency": 4, **changes}
    return OpenAI(OpenAIEngine(**settings), ASKED, "testing", seed=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait a hundredth as long; what the server wants is waited for."""
    import tenacity

    longer = tenacity.wait_random_exponential
    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda multiplier, max: longer(multiplier / 100, max=0.1))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def whole(replies):
    """Check that every query was answered wholly, once."""
    assert sorted(reply.query_id for reply in replies) == [query_id for query_id, _ in QUERIES]
    texts = dict(QUERIES)
    for reply in replies:
        for task in ("paraphrases", "negatives"):
            assert reply.replied[task] == json.loads(content(task, texts[reply.query_id]))[task]
    return True


def test_every_query_is_asked_for_once_and_so_many_at_a_time(tmp_path):
    with serving(lambda *_: time.sleep(0.05)) as server:
        replies = query_live(engine(server.url), QUERIES, tmp_path, "x")
        assert whole(replies)
        assert set(server.asked.values()) == {1} and len(server.asked) == 2 * len(QUERIES)
        assert 2 <= server.most_flying <= 4
        assert len({body["seed"] for body in server.bodies}) == len(QUERIES)
        assert all(body["response_format"]["type"] == "json_schema" for body in server.bodies)
        again = query_live(engine(server.url), QUERIES, tmp_path, "x")
        assert again == replies and len(server.bodies) == 2 * len(QUERIES)
    table = augmented_table(QUERIES, replies, "openai", ASKED, "x")
    assert len(table) == 4 * len(QUERIES) and set(table["engine"]) == {"openai"}


def cut(handler, *_):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
    return True


PASSING = {
    "429": lambda handler, *_: handler.refuse(429, "slow down") or True,
    "500": lambda handler, *_: handler.refuse(500, "oops") or True,
    "503": lambda handler, *_: handler.send(503, b"<html>loading</html>") or True,
    "a connection cut in mid-reply": cut,
    "no JSON at all": lambda handler, *_: handler.send(200, b'{"choices": [{') or True,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(tmp_path, name):
    def fault(handler, task, query, attempt):
        return task != "models" and attempt < 3 and PASSING[name](handler)

    with serving(fault) as server:
        assert whole(query_live(engine(server.url), QUERIES, tmp_path, "x"))
        assert set(server.asked.values()) == {3}


def test_the_server_says_how_long_to_wait(tmp_path):
    seen = {}

    def fault(handler, task, query, attempt):
        seen.setdefault((task, query), []).append(time.monotonic())
        return task != "models" and attempt == 1 and (handler.refuse(429, "wait", Retry_After=1) or True)

    with serving(fault) as server:
        assert whole(query_live(engine(server.url, concurrency=12), QUERIES, tmp_path, "x"))
    assert all(times[1] - times[0] >= 1 for (task, _), times in seen.items() if task != "models")


def never_ending(handler, *_):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.1)
    return True


def test_a_reply_that_never_ends_fails_its_query_alone_and_is_asked_for_again(tmp_path):
    slow = QUERIES[3][1]

    def fault(handler, task, query, attempt):
        return (task, query) == ("paraphrases", slow) and attempt <= 2 and never_ending(handler)

    with serving(fault) as server:
        settings = {"timeout": 1, "attempts": 2}
        replies = query_live(engine(server.url, **settings), QUERIES, tmp_path, "x")
        assert [reply.query_id for reply in replies if reply.failure] == [QUERIES[3][0]]
        with pytest.raises(EngineError, match=r"1 of 12 queries failed.*no whole reply within 1 s \(1\)"):
            augmented_table(QUERIES, replies, "openai", ASKED.model_copy(update={"max_failed_share": 0.0}), "x")
        assert len(augmented_table(QUERIES, replies, "openai", ASKED, "x")) == 44
        assert whole(query_live(engine(server.url, **settings), QUERIES, tmp_path, "x"))


@pytest.mark.parametrize("text", ["", "no JSON", '{"paraphrases": ["cut o', "null", "[1, 2]", '{"other": 1}'])
def test_a_useless_reply_is_refused_and_not_fatal(tmp_path, text):
    with serving(lambda handler, task, *_: task == "negatives" and (handler.answer(text) or True)) as server:
        replies = query_live(engine(server.url), QUERIES, tmp_path, "x")
    assert all(reply.replied["negatives"] is None and reply.replied["paraphrases"] for reply in replies)
    with pytest.raises(EngineError, match="12 of 12 queries failed"):
        augmented_table(QUERIES, replies, "openai", ASKED, "x")


@pytest.mark.parametrize(("takes", "refusals"), [("json_object", 1), ("text", 2)])
def test_a_format_that_is_refused_is_not_asked_for_again(tmp_path, caplog, takes, refusals):
    def fault(handler, task, *_):
        if task == "models":
            return False
        kind = handler.server.bodies[-1].get("response_format", {"type": "text"})["type"]
        if kind in ("json_schema", "json_object")[:refusals]:
            handler.refuse(400, f"response_format {kind} is not supported")
            return True
        prompt = handler.server.bodies[-1]["messages"][-1]["content"]
        assert "JSON schema" in prompt and "maxItems" in prompt
        return False

    with serving(fault) as server, caplog.at_level("WARNING"):
        assert whole(query_live(engine(server.url, concurrency=1), QUERIES, tmp_path, "x"))
        assert len(server.bodies) == 2 * len(QUERIES) + refusals
    said = [record.getMessage() for record in caplog.records if "refuses the format" in record.getMessage()]
    assert len(said) == 1 and f"asking with {takes}" in said[0]


def test_words_around_the_json_do_no_harm(tmp_path):
    def fault(handler, task, query, _):
        return task != "models" and (handler.answer(f"Sure!\n```json\n{content(task, query)}\n```") or True)

    with serving(fault) as server:
        assert whole(query_live(engine(server.url), QUERIES, tmp_path, "x"))


def test_a_query_that_the_server_refuses_fails_alone(tmp_path):
    def fault(handler, task, query, _):
        return query == QUERIES[5][1] and (handler.refuse(400, "longer than the context") or True)

    with serving(fault) as server:
        replies = query_live(engine(server.url), QUERIES, tmp_path, "x")
        assert [reply.query_id for reply in replies if reply.replied["paraphrases"] is None] == [QUERIES[5][0]]
        # It was the query and not the format: the others are asked for with the schema all the same.
        others = [body for body in server.bodies if QUERIES[5][1] not in body["messages"][-1]["content"]]
        assert {body["response_format"]["type"] for body in others} == {"json_schema"}


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses with 401.*Set the environment variable OPENAI_API_KEY"), (403, "403"), (404, "404.*Correct `url`")],
)
def test_refusals_stop_at_once_and_do_not_show_the_key(tmp_path, status, message, caplog):
    def fault(handler, task, query, attempt):
        assert handler.headers["Authorization"] == f"Bearer {KEY}"
        return task != "models" and (handler.refuse(status, f"not with {KEY}, no") or True)

    with serving(fault) as server, caplog.at_level("DEBUG"):
        with pytest.raises(EngineError, match=message) as caught:
            query_live(engine(server.url), QUERIES, tmp_path, "x")
        assert len(server.bodies) <= 4
    assert "not with ***, no" in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_wrong_key_is_known_before_the_first_query(monkeypatch):
    def fault(handler, task, *_):
        return handler.headers["Authorization"] != "Bearer right" and (handler.refuse(401, "who are you?") or True)

    with serving(fault) as server:
        with pytest.raises(EngineError, match=r"refuses with 401 .*who are you"):
            engine(server.url)
        monkeypatch.setenv("MY_KEY", "right")
        engine(server.url, key_variable="MY_KEY")


def test_a_server_that_is_down_is_known_within_seconds():
    with serving() as server:
        url = server.url
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"no server answers there .*Start it, or correct `url`"):
        engine(url)
    assert time.monotonic() - start < 15


def test_a_server_that_goes_away_loses_nothing_and_is_gone_on_with(tmp_path):
    gone = threading.Event()

    def fault(handler, *_):
        if len(handler.server.asked) > 12:
            gone.set()
        if gone.is_set():
            handler.close_connection = True
            return True
        return False

    with serving(fault) as server, pytest.raises(EngineError, match=r"stopped answering .*run again when it is back"):
        query_live(engine(server.url), QUERIES, tmp_path, "x")
    kept = sum(len(path.read_text().splitlines()) for path in tmp_path.rglob("*.jsonl"))
    assert 1 <= kept < len(QUERIES)
    with serving() as server:
        assert whole(query_live(engine(server.url), QUERIES, tmp_path, "x"))
        assert len(server.bodies) == 2 * (len(QUERIES) - kept)


def test_a_server_restarted_half_way_is_waited_for(tmp_path):
    first = Server(lambda *_: time.sleep(0.05))
    thread = threading.Thread(target=first.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    second = []

    def restart():
        time.sleep(0.3)
        first.shutdown()
        first.server_close()
        time.sleep(0.3)
        second.append(Server(port=first.server_address[1]))
        second[0].serve_forever(poll_interval=0.02)

    restarting = threading.Thread(target=restart, daemon=True)
    restarting.start()
    assert whole(query_live(engine(first.url, attempts=100, concurrency=2), QUERIES, tmp_path, "x"))
    second[0].shutdown()
    second[0].server_close()
    restarting.join()


def augment_and_be_killed(url, folder):
    query_live(engine(url, concurrency=8), MANY, folder, "x")


MANY = [(f"{number:08x}00000000", f"query number {number}") for number in range(200)]


def test_kills_lose_and_repeat_no_finished_reply(tmp_path, request):
    """Killed at random moments, always before the end, it ends with each query's reply once."""
    import random

    context = multiprocessing.get_context("spawn")
    with serving(lambda *_: time.sleep(0.005)) as server:
        for seed in range(request.config.getoption("--kills")):
            process = context.Process(target=augment_and_be_killed, args=(server.url, tmp_path))
            process.start()
            before, deadline = len(server.bodies), time.monotonic() + 60
            # At work, and for a moment.
            while len(server.bodies) == before and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(random.Random(seed).uniform(0, 0.1))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        kept = {json.loads(line)["query_id"] for path in tmp_path.rglob("*.jsonl")
                for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}  # fmt: skip
        asked = len(server.bodies)
        replies = query_live(engine(server.url, concurrency=8), MANY, tmp_path, "x")
        assert len(server.bodies) - asked == 2 * (len(MANY) - len(kept))
    assert [reply.query_id for reply in replies] == [query_id for query_id, _ in MANY]
    assert all(reply.replied["negatives"] and reply.failure is None for reply in replies)
    lines = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(line["query_id"] for line in lines) == [query_id for query_id, _ in MANY]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(EngineError, match=r"the package tenacity is not installed .*requirements/openai\.txt"):
        engine("http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://me:secret@x/v1", "http://x/v1?key=secret", "x"]
)
def test_an_address_is_an_address(url):
    with pytest.raises(ValueError, match=r"it is no address|it holds more than an address"):
        OpenAIEngine(type="openai", url=url, model="m")


def test_a_key_in_the_config_is_refused():
    with pytest.raises(ValueError, match="key_variable"):
        OpenAIEngine(type="openai", url="http://x/v1", model="m", key_variable="sk-123abc")
