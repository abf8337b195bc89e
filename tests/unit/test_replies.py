"""Replies are untrusted: what is good of them is kept, the rest is refused with a reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachelora.augment.reply import RawReply, check_reply, parse_json
from cachelora.schemas import KINDS

GOOD = {"paraphrases": ["signs of gout", "gout symptoms"], "negatives": [{"kind": "aspect", "text": "cure for gout"}]}


def reply(replied, query="what is gout", max_chars=40):
    return check_reply(RawReply("id", replied, "m", "v", "e"), query, max_chars)


def test_bad_texts_are_refused_one_by_one():
    replied = {
        "paraphrases": ["signs of gout", "What is gout?", "Signs of gout!", "a\u0007b", "", 7, "x" * 41],
        "negatives": [
            {"kind": "aspect", "text": "cure  for gout"},
            {"kind": "hard", "text": "y"},
            {"kind": "paraphrase", "text": "not one of its kinds"},
            {"text": "z"},
            "text only",
            {"kind": "scope", "text": "cure for gout."},
            {"kind": "aspect", "text": "Yes, gout can be cured."},
        ],
    }
    checked = reply(replied)
    assert checked.texts == [("paraphrase", "signs of gout"), ("aspect", "cure for gout")]
    assert checked.refused == {
        "repeats the query or another text": 3,
        "holds control characters": 1,
        "holds no word": 1,
        "not of the form that was asked for": 3,
        "too long": 1,
        "unknown kind": 2,
        "an answer or comment, not a query": 1,
    }


@pytest.mark.parametrize(
    "text",
    [
        "Yes, you can take both.",
        "No. It is not.",
        "Sure! here they are",
        "Here are three paraphrases:",
        "I'm sorry, but I can't help with that",
        "As an AI language model",
        "The answer is 42",
    ],
)
def test_answers_and_comments_are_no_queries(text):
    assert reply({"paraphrases": [text]}).texts == []


@pytest.mark.parametrize(
    "text",
    [
        "no fever but chills, why",
        "yes or no: is gout curable",
        "ok to drink beer with gout?",
        "sure signs of gout",
        "here in Berlin, who treats gout",
        "I'm sorry for asking: is gout contagious",
        "note taking with gout in the hands",
    ],
)
def test_queries_that_begin_like_answers_are_kept(text):
    assert reply({"paraphrases": [text]}, max_chars=99).texts == [("paraphrase", text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"paraphrases": ["a", "b', {"paraphrases": ["a"]}),
        ('{"paraphrases": ["a", "b"', {"paraphrases": ["a", "b"]}),
        ('{"negatives": [{"kind": "aspect", "text": "x"}, {"kind": "sc',
         {"negatives": [{"kind": "aspect", "text": "x"}, {}]}),
        # What stands before the fault is no whole text.
        ('{"paraphrases": ["a", "b "quoted" c", "d"]}', {"paraphrases": ["a"]}),
        ('{"negatives": [{"kind": "aspect", "text": "x"}, {"kind": "scope", "text": "foo "bar" b"}]}',
         {"negatives": [{"kind": "aspect", "text": "x"}, {"kind": "scope"}]}),
        ('Sure!\n```json\n{"paraphrases": ["a"]}\n```', {"paraphrases": ["a"]}),
        ('{"paraphrases": ["two\nlines", "c"]}', {"paraphrases": ["two\nlines", "c"]}),
        ('<think>as {"paraphrases": ["x"]}?</think>\n{"paraphrases": ["a"]}', {"paraphrases": ["a"]}),
        ('thoughts with {"paraphrases": ["x"]}</think>{"paraphrases": ["a"]}', {"paraphrases": ["a"]}),
        # Cut while it thought.
        ('<think>maybe {"paraphrases": ["draft one", "draft two"]} hmm no, bet', None),
        ('{"paraphrases": ["what is a </think> tag", "b"]}', {"paraphrases": ["what is a </think> tag", "b"]}),
        ('{"paraphrases": ["a", ' + "1" * 5000 + "]}", None),
        ("no JSON", None),
        ("", None),
        ("null", None),
        ("[1, 2]", None),
    ],
)  # fmt: skip
def test_of_cut_or_faulty_json_what_is_whole_is_read(text, value):
    assert parse_json(text) == value


@pytest.mark.parametrize("text", ["---", "\u200b\u200b", "\u0301", "。。", "turn \u202e around"])
def test_texts_without_a_word_or_with_hidden_directions_are_refused(text):
    assert reply({"paraphrases": [text]}).texts == []


def test_a_cut_reply_keeps_its_whole_texts():
    replied = {
        "paraphrases": '{"paraphrases": ["signs of gout", "gout sym',
        "negatives": '{"negatives": [{"kind": "aspect", "text": "cure for gout"}',
    }
    checked = reply(replied)
    assert checked.texts == [("paraphrase", "signs of gout"), ("aspect", "cure for gout")]
    assert checked.end(1, 1) == "complete"
    assert checked.end(3, 1) == "partial"
    assert reply({"paraphrases": "x", "negatives": "y"}).end(1, 1) == "failed"


@given(st.text(max_size=50), st.data())
def test_no_cut_makes_a_text_that_was_not_written(text, data):
    whole = json.dumps({"paraphrases": [*GOOD["paraphrases"], text]}, ensure_ascii=data.draw(st.booleans()))
    assert parse_json(whole) == json.loads(whole)
    for cut in range(1, len(whole)):
        parsed = parse_json(whole[:cut])
        assert set(parsed.get("paraphrases", [])) <= {*GOOD["paraphrases"], text}
    parse_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["paraphrases", "negatives", "kind", "text"]), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_reply_gives_good_texts_or_none(replied):
    for value in (replied, {"paraphrases": json.dumps(replied), "negatives": json.dumps(replied)}):
        checked = check_reply(RawReply("id", value, "m", "v", "e"), "a query", 100)
        for kind, text in checked.texts:
            assert kind in ("paraphrase", *KINDS)
            assert 0 < len(text) <= 100
        assert (checked.end(1, 1) == "failed") == (not {"paraphrase"} < {kind for kind, _ in checked.texts})
