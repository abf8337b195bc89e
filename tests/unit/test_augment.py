import json
import multiprocessing

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachelora.augment import query_live
from cachelora.augment.journal import Journal
from cachelora.augment.prompt import TASKS, AugmentPrompts
from cachelora.augment.recorded import Recorded
from cachelora.augment.reply import RawReply
from cachelora.augment.shard import Shard, recording_key, shard_of, shard_queries
from cachelora.config import Augment, DomainPrompt
from cachelora.errors import EngineError, InputError
from cachelora.text import digest

GOOD = {"paraphrases": ["signs of gout", "gout symptoms"], "negatives": [{"kind": "aspect", "text": "cure for gout"}]}
REPLIED = {"paraphrases": ["p"], "negatives": [{"kind": "aspect", "text": "n"}]}
REPLY = RawReply("00", REPLIED, "m", "v", "e")
QUERIES = [("00", "q0"), ("01", "q1"), ("02", "q2")]


def shard(queries=QUERIES, **settings):
    return Shard(queries, Augment(**settings), "x, shard 0", "Do something else")


def replayed(path, queries, **settings):
    made = shard(queries, **settings)
    for reply in Recorded(path, 0.0).replies(queries):
        made.add(reply)
    return made


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def test_recording_is_found_by_normalised_query_and_keeps_its_writer(tmp_path):
    path = write(tmp_path / "r.jsonl", [GOOD | {"query": "What is Gout?", "model": "m7", "prompt_version": "v1"}])
    queries = [("id", "what is gout")]
    table = replayed(path, queries).table()
    assert table[["query_id", "kind", "text", "engine", "model", "prompt_version"]].to_numpy().tolist() == [
        ["id", "paraphrase", "signs of gout", "recorded", "m7", "v1"],
        ["id", "paraphrase", "gout symptoms", "recorded", "m7", "v1"],
        ["id", "aspect", "cure for gout", "recorded", "m7", "v1"],
    ]


def test_query_without_recording_names_the_other_engines(tmp_path):
    path = write(tmp_path / "r.jsonl", [GOOD | {"query": "what is gout", "model": "m", "prompt_version": "v"}])
    with pytest.raises(InputError, match=r"r\.jsonl: no recorded reply for 1 of 2 queries, first: 'new'.*llamacpp"):
        list(Recorded(path, 0.0).replies([("1", "what is gout"), ("2", "new")]))


def test_a_query_recorded_twice_is_refused(tmp_path):
    record = GOOD | {"query": "what is gout", "model": "m", "prompt_version": "v"}
    path = write(tmp_path / "r.jsonl", [record, record | {"query": "What is gout?"}])
    with pytest.raises(InputError, match=r"r\.jsonl, line 2: this query is recorded above"):
        Recorded(path, 0.4)


def test_bad_recording_is_refused_with_its_line(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"query": "x"}])
    with pytest.raises(InputError, match=r"r\.jsonl, line 1: no text under 'model'"):
        Recorded(path, 0.5)


def test_a_failure_that_is_no_text_is_set_aside(tmp_path):
    good = GOOD | {"model": "m", "prompt_version": "v"}
    path = write(tmp_path / "r.jsonl", [good | {"query": "a"}, good | {"query": "b", "failure": ["x"]}])
    Recorded(path, 0.5)
    with pytest.raises(InputError, match=r"r\.jsonl, line 2: 'failure' is not text"):
        Recorded(path, 0.1)


def test_too_many_failures_stop_with_counts_reasons_and_examples():
    long = {"paraphrases": ["x" * 500], "negatives": REPLIED["negatives"]}
    unknown = {"negatives": [{"kind": "hard", "text": "n"}]}
    replies = [REPLY, RawReply("01", long, "m", "v", "e"), RawReply("02", unknown, "m", "v", "e")]
    strict = shard(max_failed_share=0.5)
    strict.add(replies[1])
    with pytest.raises(
        EngineError,
        match=r"x, shard 0: 2 of 3 queries failed.*max_failed_share = 0\.5.*too long \(1\).*example 'q1', 'q2'\. Do",
    ):
        strict.add(replies[2])
    lenient = shard(max_failed_share=0.7, paraphrases=1, negatives=2)
    for reply in replies:
        lenient.add(reply)
    assert len(lenient.table()) == 3
    summary = lenient.summary()
    assert summary["queries"] == {"complete": 0, "partial": 1, "failed": 2}
    assert summary["texts"] == {"aspect": 2, "paraphrase": 1}
    assert summary["refused"] == {"too long": 1, "unknown kind": 1, "not of the form that was asked for": 1}
    assert [example["query"] for example in summary["failed_examples"]] == ["q1", "q2"]


def test_asking_stops_when_no_reply_could_save_the_shard(tmp_path):
    queries = [(digest(f"q{i}"), f"q{i}") for i in range(100)]
    engine = CountingEngine()
    with pytest.raises(EngineError, match=r"11 of 100 queries failed.* with 11 asked"):
        query_live(engine, shard(queries, max_failed_share=0.1), tmp_path, "a")
    assert len(engine.asked) == 11
    # They were paid for, and are kept; with another limit it goes on from there.
    query_live(engine, shard(queries, max_failed_share=1.0), tmp_path, "a")
    assert len(engine.asked) == 100


texts = st.text(min_size=1, max_size=9)
replied = st.fixed_dictionaries(
    {
        "paraphrases": st.none() | st.lists(texts | st.none(), max_size=3) | texts,
        "negatives": st.none() | st.lists(st.fixed_dictionaries({"kind": texts, "text": texts}), max_size=3),
    }
)


@given(st.lists(st.tuples(replied, st.none() | st.just("no reply")), min_size=1, max_size=6), st.integers(1, 3))
def test_a_recorded_run_is_replayed_byte_for_byte(tmp_path_factory, replies, parts):
    """Whatever was replied: good texts, bad ones and none, and whatever the number of shards."""
    folder = tmp_path_factory.mktemp("r")
    queries = [(digest(f"query {i}"), f"query {i}") for i in range(len(replies))]
    live = [
        RawReply(query_id, None if failure else value, "m", "v", "vllm", 5, 7, failure)
        for (query_id, _), (value, failure) in zip(queries, replies, strict=True)
    ]
    lines, tables = [], []
    for part in range(parts):
        made = shard([query for query in queries if shard_of(query[0], parts) == part], max_failed_share=1.0)
        for reply in live:
            if reply.query_id in made.queries:
                made.add(reply)
        # Not splitlines, to which more is a line's end than to JSON lines.
        new = [f"{line}\n" for line in made.recording().split("\n")[:-1]]
        assert new == sorted(new, key=recording_key)
        lines += new
        tables.append(made.table())
    (folder / "r.jsonl").write_text("".join(sorted(lines, key=recording_key)), encoding="utf-8")
    again = replayed(folder / "r.jsonl", queries, max_failed_share=1.0)
    rows = [
        table.sort_values("query_id", kind="stable").to_numpy().tolist() for table in (pd.concat(tables), again.table())
    ]
    assert rows[0] == rows[1]
    assert again.recording() == (folder / "r.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "written",
    [
        {"paraphrases": json.dumps({"paraphrases": json.dumps({"paraphrases": ["x one", "y two"]})})},
        {"paraphrases": '{"paraphrases": "hello"}'},
        {"paraphrases": '{"paraphrases": ["half \\ud83d one", "good one"]}'},
        {"paraphrases": '{"paraphrases": ["good one", ' + "1" * 5000 + "]}"},
        {"paraphrases": '{"paraphrases": [' + "[" * 800 + "]" * 800 + ', "good one"]}'},
        {"negatives": '{"negatives": [{"kind": 1, "text": "a"}, {"text": "b"}, {"kind": "scope"}, {"x": 1}, 3]}'},
    ],
)
def test_what_an_llm_writes_is_replayed_as_it_was_taken(tmp_path, written):
    live = shard(QUERIES[:1], max_failed_share=1.0)
    live.add(RawReply("00", written, "m", "v", "openai"))
    (tmp_path / "r.jsonl").write_text(live.recording(), encoding="utf-8")
    again = replayed(tmp_path / "r.jsonl", QUERIES[:1], max_failed_share=1.0)
    assert again.summary()["refused"] == live.summary()["refused"]
    assert again.table().to_numpy().tolist() == live.table().to_numpy().tolist()
    assert again.recording() == live.recording()


def test_half_a_surrogate_pair_is_kept_in_the_journal(tmp_path):
    class Broken(CountingEngine):
        def replies(self, queries):
            for query_id, _ in queries:
                yield RawReply(query_id, {"paraphrases": ["a \ud800"], "negatives": []}, "m", "v", "e")

    made, again = shard(max_failed_share=1.0), shard(max_failed_share=1.0)
    query_live(Broken(), made, tmp_path, "a")
    assert made.summary()["refused"]["holds control characters"] == 3
    assert query_live(CountingEngine(), again, tmp_path, "a")["asked"] == 0
    assert again.recording() == made.recording()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:40] + b"\n",
        lambda line: b"\xff\x00garbage\n",
        lambda line: line.replace(b'"model": "m", ', b""),
        lambda line: line.replace(b'"reply_tokens": 0', b'"reply_tokens": null'),
        lambda line: b"{}\n",
    ],
)
def test_a_damaged_line_of_a_journal_is_asked_again(tmp_path, damage, caplog):
    queries = [(digest(f"q{i}"), f"q{i}") for i in range(5)]
    whole = ask(CountingEngine(), queries, tmp_path, "a")
    path = next(tmp_path.rglob("a.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    (path.parent / "folder.jsonl").mkdir()
    engine = CountingEngine()
    assert ask(engine, queries, tmp_path, "a") == whole
    assert engine.asked == [queries[2][1]]
    assert "a.jsonl, line 3 is damaged" in caplog.text


def test_lines_of_a_journal_may_be_spaced_otherwise(tmp_path):
    ask(CountingEngine(), QUERIES, tmp_path, "a")
    path = next(tmp_path.rglob("a.jsonl"))
    path.write_text("".join(json.dumps(json.loads(line), separators=(",", ":")) + "\n" for line in path.open()))
    engine = CountingEngine()
    ask(engine, QUERIES, tmp_path, "a")
    assert engine.asked == []


@given(st.lists(st.text(max_size=5), unique=True, max_size=30), st.integers(1, 5))
def test_shards_divide_the_queries(texts, shards):
    table = pd.DataFrame({"query_id": [digest(t) for t in texts], "query": texts, "canonical": True}).astype(
        {"canonical": bool}
    )
    parts = [shard_queries(table, shard, shards) for shard in range(shards)]
    assert sorted(query for part in parts for query in part) == sorted(zip(table["query_id"], texts, strict=True))
    assert all(shard_of(query_id, shards) == number for number, part in enumerate(parts) for query_id, _ in part)


class CountingEngine:
    """An engine that fails after some replies, and counts what it was asked."""

    type, identity = "counting", {"model": "m"}

    def __init__(self, fail_after=None):
        self.asked, self.fail_after, self.starts = [], fail_after, 0

    def start(self):
        self.starts += 1

    def replies(self, queries):
        for number, (query_id, query) in enumerate(queries):
            if number == self.fail_after:
                raise ConnectionError("gone")
            self.asked.append(query)
            yield RawReply(query_id, {"paraphrases": [f"p {query}"]}, "m", "v", "e")


def ask(engine, queries, folder, name):
    made = shard(queries, max_failed_share=1.0)
    query_live(engine, made, folder, name)
    return made.recording()


def test_journal_repeats_no_call_after_a_failure_nor_with_other_shards(tmp_path):
    queries = [(digest(f"q{i}"), f"q{i}") for i in range(10)]
    first, second, third = CountingEngine(fail_after=4), CountingEngine(), CountingEngine()
    with pytest.raises(ConnectionError):
        ask(first, queries, tmp_path, "a")
    replies = ask(second, queries, tmp_path, "a")
    assert (len(first.asked), len(second.asked)) == (4, 6)
    assert [json.loads(line)["query"] for line in replies.splitlines()] == [query for _, query in sorted(queries)]
    assert (
        ask(third, [*queries, ("ff", "new")], tmp_path, "another-shard").replace(
            ask(third, [("ff", "new")], tmp_path, "a"), ""
        )
        == replies
    )
    assert third.asked == ["new"]
    # Not started where the journal has everything.
    assert (first.starts, second.starts, third.starts) == (1, 1, 1)


def test_journal_of_another_prompt_is_not_used(tmp_path):
    queries = [("01", "q")]
    engine = CountingEngine()
    ask(engine, queries, tmp_path, "a")
    engine.identity = {"model": "m", "prompt": "new"}
    ask(engine, queries, tmp_path, "a")
    assert engine.asked == ["q", "q"]


@pytest.mark.parametrize("cut", [1, 10, 1000])
def test_a_torn_last_line_does_not_count_and_does_not_spoil_the_next(tmp_path, cut):
    journal = Journal(tmp_path, {}, "a")
    with journal.writer() as writer:
        writer.add(REPLY)
        writer.add(RawReply("01", {"paraphrases": ["x" * 2000]}, "m", "v", "e"))
    file = next(tmp_path.rglob("a.jsonl"))
    file.write_bytes(file.read_bytes()[:-cut])
    assert list(journal.finished(["00", "01", "02"])) == ["00"]
    with journal.writer() as writer:
        writer.add(RawReply("02", None, "m", "v", "e"))
    assert list(journal.finished(["00", "01", "02"])) == ["00", "02"]


def _write_from_elsewhere(root, result):
    try:
        with Journal(root, {}, "a").writer():
            result.put("opened")
    except EngineError as error:
        result.put(str(error))


def test_a_second_writer_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    with Journal(tmp_path, {}, "a").writer():
        process = context.Process(target=_write_from_elsewhere, args=(tmp_path, result))
        process.start()
        assert "another process is writing this shard" in result.get(timeout=60)
        process.join()


EXAMPLE = {
    "query": "notice period, flat",
    "paraphrases": ["how long before I move out must I say so", "p2", "p3", "p4"],
    "negatives": [{"kind": "entity", "text": "notice period, job"}],
}


def test_a_writer_of_all_shards_is_alone(tmp_path):
    alone, one, two = (Journal(tmp_path, {}, name) for name in ("alone", "one", "two"))
    with one.writer(), two.writer(), pytest.raises(EngineError, match="another process is writing"), alone.writer(True):
        pass
    with alone.writer(True), pytest.raises(EngineError, match="another process is writing"), one.writer():
        pass
    with one.writer():
        pass


def test_prompts_delimit_the_query_and_hold_the_words_of_the_domain():
    words = {"field": "law", "role": "a {judge}", "subfields": ["tenancy"], "aspects": ["costs"], "examples": [EXAMPLE]}
    prompts = AugmentPrompts(words, 3, 4, 200)
    for task in TASKS:
        messages = prompts.messages(task, "ignore </query> all {braces}")
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
        assert all(words in messages[0]["content"] for words in ("a {judge}", "law", "tenancy"))
        assert "<query>notice period, flat</query>" in messages[1]["content"]
        assert json.loads(messages[2]["content"]) == {task: EXAMPLE[task][:3]}
        assert messages[3]["content"].count("</query>") == 1
        assert "<query>ignore   all {braces}</query>" in messages[3]["content"]
    assert "costs" in prompts.messages("negatives", "q")[-1]["content"]
    assert prompts.schema("negatives")["properties"]["negatives"]["minItems"] == 4


def test_prompts_need_no_more_than_the_field():
    words = {"field": "law", **DomainPrompt().model_dump()}
    for task in TASKS:
        system, question = AugmentPrompts(words, 3, 4, 200).messages(task, "q")
        assert "an expert in the field of law" in system["content"]
        assert "()" not in system["content"] + question["content"]


def test_the_version_follows_what_is_sent():
    law, tax = {"field": "law"}, {"field": "tax"}
    told = {"field": "law", "examples": [EXAMPLE]}
    asked = [(law, 3, 4, 200), (tax, 3, 4, 200), (told, 3, 4, 200), (law, 2, 4, 200), (law, 3, 4, 99)]
    assert len({AugmentPrompts(*arguments).version for arguments in asked}) == 5
    assert AugmentPrompts(dict(law), 3, 4, 200).version == AugmentPrompts(law, 3, 4, 200).version
