"""The engines that ask a server, against one that does everything wrong that a server can do."""

import importlib.util
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import KEY, ROOT

from cachelora.augment import query_live
from cachelora.augment.ollama import Ollama
from cachelora.augment.openai import OpenAI
from cachelora.augment.prompt import AugmentPrompts
from cachelora.augment.server import retry_after
from cachelora.augment.shard import Shard
from cachelora.cli import main
from cachelora.config import Augment, OllamaEngine, OpenAIEngine
from cachelora.errors import EngineError

if missing := [name for name in ("openai", "ollama", "tenacity") if not importlib.util.find_spec(name)]:
    pytest.skip(f"not installed: {', '.join(missing)} (requirements/)", allow_module_level=True)

ASKED = Augment(paraphrases=2, negatives=2, max_chars=80, max_failed_share=1.0)
PROMPTS = AugmentPrompts({"field": "testing"}, ASKED.paraphrases, ASKED.negatives, ASKED.max_chars)
QUERIES = [(f"{number:08x}00000000", f"query number {number}") for number in range(12)]


def content(task, query):
    texts = {
        "paraphrases": [f"{query} said so", f"{query} in other words"],
        "negatives": [{"kind": "aspect", "text": f"{query} but why"}, {"kind": "scope", "text": f"{query} here"}],
    }
    return json.dumps({task: texts[task]})


class Server(ThreadingHTTPServer):
    """Answers as it should, unless ``fault`` does something else: a function of handler, task, query and attempt."""

    daemon_threads = True
    request_queue_size = 1000

    def __init__(self, fault=None, port=0):
        self.fault = fault or (lambda *_: False)
        self.asked = Counter()
        self.bodies = []
        self.models = ["m"]
        self.lock = threading.Lock()
        self.flying = self.most_flying = 0
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients that hang up are no news."""


class Handler(BaseHTTPRequestHandler):
    """Speaks OpenAI's protocol under /v1, and Ollama's under /api."""

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

    @property
    def ollama(self):
        return self.path.startswith("/api/")

    def answer(self, text, reason="stop"):
        message = {"role": "assistant", "content": text}
        if self.ollama:
            head = {"model": "m", "created_at": "2026-01-01T00:00:00Z", "done": True, "done_reason": reason}
            self.send(200, head | {"message": message, "prompt_eval_count": 9, "eval_count": 7})
        else:
            usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
            choices = [{"index": 0, "message": message, "finish_reason": reason}]
            head = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            self.send(200, head | {"choices": choices, "usage": usage})

    def refuse(self, status, message, **headers):
        error = message if self.ollama else {"message": message, "type": "x", "code": None}
        self.send(status, {"error": error}, **headers)

    def do_GET(self):
        if self.server.fault(self, "models", "", 1):
            return
        if self.ollama:
            self.send(200, {"models": [{"model": f"{name}:latest", "digest": "d1"} for name in self.server.models]})
        else:
            models = [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in self.server.models]
            self.send(200, {"object": "list", "data": models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/pull":
            self.server.models.append(body["model"])
            parts = [{"status": "pulling", "completed": n, "total": 4} for n in range(5)] + [{"status": "success"}]
            self.send(200, b"".join(json.dumps(part).encode() + b"\n" for part in parts))
            return
        prompt = body["messages"][-1]["content"]
        task = "negatives" if "look like the query" in prompt else "paraphrases"
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


def start(protocol, url, **changes):
    settings = {"type": protocol, "url": url, "model": "m", "timeout": 5, "attempts": 3, "concurrency": 4, **changes}
    if protocol == "openai":
        engine = OpenAI(OpenAIEngine(**settings | {"url": f"{url}/v1"}), PROMPTS, seed=1)
    else:
        engine = Ollama(OllamaEngine(**settings), PROMPTS, seed=1)
    engine.start()
    return engine


@pytest.fixture(params=["openai", "ollama"])
def engine(request):
    """How an engine of each protocol is started."""

    def starter(url, **changes):
        return start(request.param, url, **changes)

    starter.type = request.param
    return starter


@pytest.fixture
def openai_engine():
    return lambda url, **changes: start("openai", url, **changes)


@pytest.fixture
def ollama_engine():
    return lambda url, **changes: start("ollama", url, **changes)


def ask(started, folder, queries=QUERIES, settings=ASKED):
    """Ask for the replies of a shard, through its journal."""
    shard = Shard(queries, settings, "x", "Mend it")
    query_live(started, shard, folder, "x")
    return shard


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait a hundredth as long; what the server wants is waited for."""
    import tenacity

    longer = tenacity.wait_exponential_jitter
    monkeypatch.setattr(
        tenacity,
        "wait_exponential_jitter",
        lambda multiplier, max: longer(multiplier=multiplier / 100, max=0.1, jitter=0.01),
    )
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)


def whole(shard):
    """Check that every query was answered wholly, once."""
    assert shard.ends == {"complete": len(shard.queries)}
    records = [json.loads(line) for line in shard.recording().splitlines()]
    assert sorted(record["query"] for record in records) == sorted(shard.queries.values())
    for record in records:
        for task in ("paraphrases", "negatives"):
            assert record[task] == json.loads(content(task, record["query"]))[task]
    return True


def lines_of(folder):
    return [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]


def test_every_query_is_asked_for_once_and_so_many_at_a_time(tmp_path, engine):
    with serving(lambda *_: time.sleep(0.05)) as server:
        shard = ask(engine(server.url), tmp_path)
        assert whole(shard)
        assert set(server.asked.values()) == {1} and len(server.asked) == 2 * len(QUERIES)
        assert 2 <= server.most_flying <= 4
        if engine.type == "openai":
            assert len({body["seed"] for body in server.bodies}) == len(QUERIES)
            assert all(body["response_format"]["type"] == "json_schema" for body in server.bodies)
        else:
            assert len({body["options"]["seed"] for body in server.bodies}) == len(QUERIES)
            assert all(body["format"]["type"] == "object" and body["keep_alive"] == "10m" for body in server.bodies)
            assert all(body["options"]["num_ctx"] == 2048 for body in server.bodies)
        again = ask(engine(server.url), tmp_path)
        assert again.recording() == shard.recording() and len(server.bodies) == 2 * len(QUERIES)
    assert len(shard.table()) == 4 * len(QUERIES) and set(shard.table()["engine"]) == {engine.type}
    assert shard.summary()["tokens"] == {"prompt": 18 * len(QUERIES), "reply": 14 * len(QUERIES)}


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
    "an empty reply": lambda handler, *_: handler.answer("") or True,
    "an error with status 200": lambda handler, *_: handler.refuse(200, "overloaded") or True,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(tmp_path, engine, name):
    def fault(handler, task, query, attempt):
        return task != "models" and attempt < 3 and PASSING[name](handler)

    with serving(fault) as server:
        assert whole(ask(engine(server.url), tmp_path))
        assert set(server.asked.values()) == {3}


def test_the_server_says_how_long_to_wait(tmp_path, engine):
    seen = {}

    def fault(handler, task, query, attempt):
        seen.setdefault((task, query), []).append(time.monotonic())
        return task != "models" and attempt == 1 and (handler.refuse(429, "wait", Retry_After=1) or True)

    with serving(fault) as server:
        assert whole(ask(engine(server.url, concurrency=12), tmp_path))
    assert all(times[1] - times[0] >= 1 for (task, _), times in seen.items() if task != "models")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ("-3", 0),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("Fri, 01 Jan 2010 00:00:00 GMT", 0),
        ("Fri, 01 Jan 99999999999999999999 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_read(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_may_be_a_date():
    assert 55 < retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60


def never_ending(handler, *_):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.1)
    return True


def test_a_reply_that_never_ends_fails_its_query_alone_and_is_asked_for_again(tmp_path, engine):
    slow = QUERIES[3][1]

    def fault(handler, task, query, attempt):
        return (task, query) == ("paraphrases", slow) and attempt <= 4 and never_ending(handler)

    with serving(fault) as server:
        settings = {"timeout": 1, "attempts": 2}
        with pytest.raises(
            EngineError, match=r"1 of 12 queries failed.*no whole reply within 1 s \(1\).*'query number 3'"
        ):
            ask(engine(server.url, **settings), tmp_path, settings=ASKED.model_copy(update={"max_failed_share": 0.0}))
        shard = ask(engine(server.url, **settings), tmp_path)
        assert shard.ends == {"complete": 11, "failed": 1}
        assert shard.summary()["failed_examples"] == [{"query": slow, "refused": {"no whole reply within 1 s": 1}}]
        assert len(shard.table()) == 44
        assert whole(ask(engine(server.url, **settings), tmp_path))


def test_a_server_that_swallows_everything_is_not_asked_for_ever(tmp_path, engine):
    hole = threading.Event()

    def fault(handler, task, *_):
        if len(handler.server.asked) > 12:
            hole.set()
        return task != "models" and hole.is_set() and never_ending(handler)

    queries = [(f"{number:08x}00000000", f"query number {number}") for number in range(200)]
    with serving(fault) as server:
        with pytest.raises(
            EngineError, match=r"none of the last \d+ queries got a reply .*no whole reply within 0.2 s"
        ):
            ask(engine(server.url, timeout=0.2, attempts=2), tmp_path, queries)
        assert len(server.bodies) < 100
    assert 1 <= len(lines_of(tmp_path)) <= 12


@pytest.mark.parametrize("text", ["no JSON", '{"paraphrases": ["cut o', "null", "[1, 2]", '{"other": 1}'])
def test_a_useless_reply_is_refused_and_not_fatal(tmp_path, engine, text):
    with serving(lambda handler, task, *_: task == "negatives" and (handler.answer(text) or True)) as server:
        shard = ask(engine(server.url), tmp_path)
    assert shard.ends == {"failed": 12}
    assert shard.summary()["texts"] == {"paraphrase": 24}
    assert shard.summary()["refused"] == {"not of the form that was asked for": 12}


def test_a_cut_reply_is_partial_and_keeps_what_is_whole(tmp_path, engine):
    def fault(handler, task, query, _):
        return task == "negatives" and (handler.answer(content(task, query)[:-9]) or True)

    with serving(fault) as server:
        shard = ask(engine(server.url), tmp_path)
    assert shard.ends == {"partial": 12}
    assert shard.summary()["texts"] == {"aspect": 12, "paraphrase": 24}


def test_a_reply_that_stays_empty_fails_its_query_and_is_asked_for_again(tmp_path, engine):
    empty = threading.Event()
    empty.set()

    def fault(handler, task, query, _):
        return query == QUERIES[5][1] and empty.is_set() and (handler.answer("") or True)

    with serving(fault) as server:
        assert ask(engine(server.url), tmp_path).ends == {"complete": 11, "failed": 1}
        empty.clear()
        assert whole(ask(engine(server.url), tmp_path))


@pytest.mark.parametrize(("takes", "refusals"), [("json_object", 1), ("text", 2)])
def test_a_format_that_is_refused_is_not_asked_for_again(tmp_path, caplog, openai_engine, takes, refusals):
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
        assert whole(ask(openai_engine(server.url, concurrency=1), tmp_path))
        assert len(server.bodies) == 2 * len(QUERIES) + refusals
    said = [record.getMessage() for record in caplog.records if "refuses the format" in record.getMessage()]
    assert len(said) == 1 and f"asking with {takes}" in said[0]


def test_words_around_the_json_do_no_harm(tmp_path, engine):
    def fault(handler, task, query, _):
        return task != "models" and (handler.answer(f"Sure!\n```json\n{content(task, query)}\n```") or True)

    with serving(fault) as server:
        assert whole(ask(engine(server.url), tmp_path))


def test_a_query_that_the_server_refuses_fails_alone_and_is_asked_for_again(tmp_path, engine):
    refusing = threading.Event()
    refusing.set()

    def fault(handler, task, query, _):
        return query == QUERIES[5][1] and refusing.is_set() and (handler.refuse(400, "longer than the context") or True)

    with serving(fault) as server:
        shard = ask(engine(server.url), tmp_path)
        assert shard.ends == {"complete": 11, "failed": 1}
        assert shard.summary()["refused"] == {"the server refused the query": 1}
        # It was the query and not the format: the others are asked for with the schema all the same.
        others = [body for body in server.bodies if QUERIES[5][1] not in body["messages"][-1]["content"]]
        assert all("response_format" in body or "format" in body for body in others)
        refusing.clear()
        assert whole(ask(engine(server.url), tmp_path))


def test_a_server_that_refuses_every_query_is_not_asked_for_all(tmp_path, engine):
    queries = [(f"{number:08x}00000000", f"query number {number}") for number in range(200)]
    with serving(lambda handler, task, *_: task != "models" and (handler.refuse(400, "no") or True)) as server:
        with pytest.raises(EngineError, match=r"none of the last 8 queries got a reply .*the server refused the query"):
            ask(engine(server.url), tmp_path, queries)
        assert len(server.asked) < 20
    assert not lines_of(tmp_path)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses with 401.*Set the environment variable O[A-Z]*_API_KEY"),
        (403, "403"),
        (404, "404.*(C|c)orrect `url`"),
    ],
)
def test_refusals_stop_at_once_and_do_not_show_the_key(tmp_path, engine, status, message, caplog):
    def fault(handler, task, query, attempt):
        assert handler.headers["Authorization"] == f"Bearer {KEY}"
        return task != "models" and (handler.refuse(status, f"not with {KEY}, no") or True)

    with serving(fault) as server, caplog.at_level("DEBUG"):
        with pytest.raises(EngineError, match=message) as caught:
            ask(engine(server.url), tmp_path)
        assert len(server.bodies) <= 4
    assert "not with ***, no" in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "OLLAMA_API_KEY"])
def test_a_key_that_was_read_with_its_line_end_is_used_and_not_shown(variable, monkeypatch, caplog):
    monkeypatch.setenv(variable, f"{KEY}\r\n")
    protocol = variable.partition("_")[0].lower()

    def fault(handler, task, *_):
        assert handler.headers["Authorization"] == f"Bearer {KEY}"
        # At the end of what is shown.
        return handler.refuse(403, "x" * 285 + KEY) or True

    with serving(fault) as server, caplog.at_level("DEBUG"), pytest.raises(EngineError) as caught:
        start(protocol, server.url)
    assert KEY[:8] not in str(caught.value) + caplog.text
    monkeypatch.setenv(variable, "sk-ключ")
    with pytest.raises(EngineError, match=f"environment variable {variable}: it holds characters that no key has"):
        start(protocol, "http://127.0.0.1:1")


def test_a_key_in_the_list_of_models_is_not_shown(openai_engine, caplog):
    with serving() as server:
        server.models = [f"other-{KEY}"]
        openai_engine(server.url)
    assert "does not list the model m, but other-***" in caplog.text


NO_LIST = [b"<html>hello</html>", b"", b"\xff\xfe", b"[]", b"null", b'{"data": "abc"}', b'{"data": [null]}', b'"x"']


@pytest.mark.parametrize("body", NO_LIST)
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_an_address_of_something_else_is_a_clear_error(engine, body, kind):
    with (
        serving(lambda handler, *_: handler.send(200, body, Content_Type=kind) or True) as server,
        pytest.raises(EngineError, match=r"not of (the|Ollama's) protocol|does not have the model"),
    ):
        engine(server.url)


BROKEN = [
    b"[]", b"null", b"5", b'"x"', b"", b"<html>", b"\xff\xfe{", b'{"choices": [null]}', b'{"choices": "x"}',
    b'{"choices": [{"index": 0, "message": null, "finish_reason": "stop"}]}',
    b'{"choices": [{"index": 0, "message": "hello"}]}', b'{"message": null}', b'{"message": {"content": 5}}',
]  # fmt: skip


@pytest.mark.parametrize("body", BROKEN)
def test_a_broken_answer_fails_its_query_alone(tmp_path, engine, body):
    def fault(handler, task, query, _):
        return query == QUERIES[5][1] and (handler.send(200, body) or True)

    with serving(fault) as server:
        shard = ask(engine(server.url), tmp_path)
        assert server.asked["paraphrases", QUERIES[5][1]] == 3
    assert shard.ends == {"complete": 11, "failed": 1}
    assert shard.summary()["refused"] == {"an empty or broken answer": 1}


@pytest.mark.parametrize("count", [[1], {}, "many", None, -1, 1.5, float("inf")])
def test_counts_of_tokens_are_not_trusted(tmp_path, openai_engine, count):
    def fault(handler, task, query, _):
        if task == "models":
            return False
        choices = [
            {"index": 0, "message": {"role": "assistant", "content": content(task, query)}, "finish_reason": "stop"}
        ]
        handler.send(
            200, {"id": "1", "choices": choices, "usage": {"prompt_tokens": count, "completion_tokens": count}}
        )
        return True

    with serving(fault) as server:
        shard = ask(openai_engine(server.url), tmp_path)
    assert whole(shard)
    assert set(shard.summary()["tokens"].values()) == {24 if count == 1.5 else 0}


@pytest.mark.parametrize("status", [413, 422, 451])
def test_a_status_of_one_query_fails_it_alone(tmp_path, engine, status):
    with serving(lambda h, task, query, _: query == QUERIES[5][1] and (h.refuse(status, "no") or True)) as server:
        assert ask(engine(server.url), tmp_path).ends == {"complete": 11, "failed": 1}


@pytest.mark.parametrize("status", [408, 409, 425])
def test_a_status_that_passes_is_waited_for(tmp_path, engine, status):
    def fault(handler, task, query, attempt):
        return task != "models" and attempt == 1 and (handler.refuse(status, "") or True)

    with serving(fault) as server:
        assert whole(ask(engine(server.url), tmp_path))


def test_a_refusal_does_not_wait_for_what_others_wait_for(tmp_path, engine):
    def fault(handler, task, query, _):
        if task == "models":
            return False
        if query == QUERIES[0][1]:
            time.sleep(0.3)
            handler.refuse(401, "no more")
        else:
            handler.refuse(503, "later", Retry_After=20)
        return True

    with serving(fault) as server:
        begin = time.monotonic()
        with pytest.raises(EngineError, match="refuses with 401"):
            ask(engine(server.url), tmp_path)
        assert time.monotonic() - begin < 10


def test_more_in_flight_than_clients_have_connections_for(tmp_path, engine):
    queries = [(f"{number:08x}00000000", f"query number {number}") for number in range(120)]
    with serving(lambda handler, task, *_: task != "models" and time.sleep(3)) as server:
        assert whole(ask(engine(server.url, concurrency=120, timeout=60), tmp_path, queries))
        assert server.most_flying > 100


def test_a_wrong_key_is_known_before_the_first_query(monkeypatch, openai_engine):
    def fault(handler, task, *_):
        return handler.headers["Authorization"] != "Bearer right" and (handler.refuse(401, "who are you?") or True)

    with serving(fault) as server:
        with pytest.raises(EngineError, match=r"refuses with 401 .*who are you"):
            openai_engine(server.url)
        monkeypatch.setenv("MY_KEY", "right")
        openai_engine(server.url, key_variable="MY_KEY")


def test_a_server_that_is_down_is_known_within_seconds(engine):
    with serving() as server:
        url = server.url
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no server answers there .*Start it.*, or correct `url`"):
        engine(url)
    assert time.monotonic() - begin < 15


def test_a_server_that_goes_away_loses_nothing_and_is_gone_on_with(tmp_path, engine):
    gone = threading.Event()

    def fault(handler, *_):
        if len(handler.server.asked) > 12:
            gone.set()
        if gone.is_set():
            handler.close_connection = True
            return True
        return False

    with serving(fault) as server, pytest.raises(EngineError, match=r"stopped answering .*run again when it is back"):
        ask(engine(server.url), tmp_path)
    kept = len(lines_of(tmp_path))
    assert 1 <= kept < len(QUERIES)
    with serving() as server:
        assert whole(ask(engine(server.url), tmp_path))
        assert len(server.bodies) == 2 * (len(QUERIES) - kept)


def test_a_server_restarted_half_way_is_waited_for(tmp_path, engine):
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
    assert whole(ask(engine(first.url, attempts=100, concurrency=2), tmp_path))
    second[0].shutdown()
    second[0].server_close()
    restarting.join()


def augment_and_be_killed(url, folder):
    ask(start("openai", url, concurrency=8), folder, MANY)


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
        shard = ask(start("openai", server.url, concurrency=8), tmp_path, MANY)
        assert len(server.bodies) - asked == 2 * (len(MANY) - len(kept))
    assert whole(shard)
    assert sorted(line["query_id"] for line in lines_of(tmp_path)) == [query_id for query_id, _ in MANY]


def test_a_reply_that_thinking_used_up_is_not_paid_for_again(tmp_path, engine):
    def fault(handler, task, query, _):
        return query == QUERIES[5][1] and (handler.answer("", "length") or True)

    with serving(fault) as server:
        shard = ask(engine(server.url), tmp_path)
        assert server.asked["paraphrases", QUERIES[5][1]] == 1
    assert shard.ends == {"complete": 11, "failed": 1}
    assert shard.summary()["refused"] == {"max_tokens ended before the reply began": 1}


def test_an_llm_that_refuses_is_not_asked_again(tmp_path, openai_engine):
    def fault(handler, task, query, _):
        return query == QUERIES[5][1] and (handler.answer("", "content_filter") or True)

    with serving(fault) as server:
        shard = ask(openai_engine(server.url), tmp_path)
        assert server.asked["paraphrases", QUERIES[5][1]] == 1
    assert shard.summary()["refused"] == {"the LLM refused to reply": 1}


def test_requests_can_be_made_to_suit_the_server(tmp_path, openai_engine, ollama_engine):
    changes = {"max_tokens": None, "max_completion_tokens": 99, "chat_template_kwargs": {"enable_thinking": False}}
    with serving() as server:
        assert whole(ask(openai_engine(server.url, request=changes), tmp_path / "openai"))
        for body in server.bodies:
            assert "max_tokens" not in body and body["max_completion_tokens"] == 99 and body["temperature"] == 0.7
            assert body["chat_template_kwargs"] == {"enable_thinking": False}
        server.bodies.clear()
        assert whole(ask(ollama_engine(server.url, think=False), tmp_path / "ollama"))
        assert all(body["think"] is False for body in server.bodies)
    for key in ("messages", "api_key"):
        with pytest.raises(ValueError, match=f"`{key}` is not for you to set here"):
            OpenAIEngine(type="openai", url="http://x/v1", model="m", request={key: []})
    with pytest.raises(ValueError, match="it holds what JSON cannot"):
        OpenAIEngine(type="openai", url="http://x/v1", model="m", request={"x": float("nan")})
    bias = OpenAIEngine(type="openai", url="http://x/v1", model="m", request={"logit_bias": {9: -1}})
    assert bias.request == {"logit_bias": {"9": -1}}


def test_a_model_that_was_not_pulled_is_pulled_only_if_the_config_says_so(tmp_path, ollama_engine, caplog):
    with serving() as server, caplog.at_level("INFO"):
        with pytest.raises(
            EngineError, match=r"does not have the model small:1b\. Pull it with: ollama pull small:1b "
        ):
            ollama_engine(server.url, model="small:1b")
        server.models = ["m"]
        started = ollama_engine(server.url, model="small", pull=True)
        assert server.models == ["m", "small"]
        assert "pulling small: pulling 50 %" in caplog.text and "pulling small: success" in caplog.text
        assert started.identity["model"] == ["small", "d1"]
        assert whole(ask(started, tmp_path))


def test_a_missing_package_is_named(monkeypatch, engine):
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(EngineError, match=rf"the package tenacity is not installed .*requirements/{engine.type}\.txt"):
        engine("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://me:secret@x/v1", "http://x/v1?key=secret", "x"]
)
def test_an_address_is_an_address(url):
    with pytest.raises(ValueError, match=r"it is no address|it holds more than an address"):
        OpenAIEngine(type="openai", url=url, model="m")


def test_a_key_in_the_config_is_refused():
    with pytest.raises(ValueError, match="key_variable"):
        OpenAIEngine(type="openai", url="http://x/v1", model="m", key_variable="sk-123abc")


def test_an_estimate_of_a_server_that_does_not_count_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "log.txt").write_text("".join(f"query number {number}\n" for number in range(30)))

    def fault(handler, task, query, _):
        if task == "models":
            return False
        message = {"role": "assistant", "content": content(task, query)}
        handler.send(200, {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        return True

    with serving(fault) as server:
        (tmp_path / "config.yaml").write_text(f"""
pathvars: {{results: {tmp_path}/results}}
domains: {{mine: {{queries: {tmp_path}/log.txt, engine: mine}}}}
engines: {{mine: {{type: openai, url: "{server.url}/v1", model: m, price: {{prompt: 1000}}}}}}
""")
        command = ["estimate", "--configfile", str(tmp_path / "config.yaml"), "--queries", "3", "--domain", "mine"]
        assert main([*command, "--domain", "mine"]) == 0
        assert "not said by the server" in capsys.readouterr().out
        assert len(server.asked) == 6


def test_an_estimate_counts_what_is_left_and_pays_for_nothing_twice(tmp_path, monkeypatch, capsys):
    """By hand: 9 and 7 tokens a call, two calls a query; 30 queries, of which 10 are asked."""
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log.txt"
    log.write_text("".join(f"query number {number}\n" for number in range(30)))
    config = tmp_path / "config.yaml"
    with serving(lambda *_: time.sleep(0.01)) as server:
        config.write_text(f"""
pathvars: {{results: {tmp_path}/results}}
domains: {{mine: {{queries: {log}, engine: mine}}}}
engines:
  mine: {{type: openai, url: "{server.url}/v1", model: m, price: {{prompt: 1000, reply: 5000, currency: EUR}}}}
augment: {{paraphrases: 2, negatives: 2, max_chars: 80}}
""")
        command = ["estimate", "--configfile", str(config), "--queries", "10"]
        assert main(command) == 0
        (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("mine"))
        cells = re.split(r" {2,}", row)
        assert cells[3:9] == ["10 (10 complete)", "20 of 30", "40", "360", "280", "0%"]
        # 360 x 1000 / 1e6 + 280 x 5000 / 1e6
        assert cells[10] == "1.76 EUR"
        assert len(server.asked) == 20
        assert main([*command[:-1], "50"]) == 0
        assert "0 of 30" in capsys.readouterr().out
        assert len(server.asked) == 60 and set(server.asked.values()) == {1}
        assert main(command) == 0
        assert "0 (-)" in capsys.readouterr().out
        assert len(server.bodies) == 60
    assert main([*command, "--domain", "medical"]) == 1
    assert "ERROR domains.medical: its augmentation is recorded" in capsys.readouterr().err
    assert main([*command, "--domain", "none"]) == 1
    assert "ERROR --domain none: no such domain" in capsys.readouterr().err
    # With all in the journal no server is needed.
    assert main(command) == 0
    log.write_text(log.read_text() + "one more\n")
    assert main(command) == 1
    assert "no server answers there" in capsys.readouterr().err
