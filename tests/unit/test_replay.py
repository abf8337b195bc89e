"""The cache replay: what a stream holds, what a cache does with it by hand, and how it is counted."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachelora.config import Evaluate, Replay, parse
from cachelora.errors import ConfigError, InputError, ModelError
from cachelora.files import read_table, write_table
from cachelora.models import load_model
from cachelora.replay import (
    FALSE_HIT,
    HIT,
    LOOK_ALIKE,
    MISS,
    NEW,
    REPEAT,
    REWORDED,
    Choice,
    Decisions,
    Stream,
    choices_of,
    describe_stream,
    draw_stream,
    frontier,
    latencies,
    replay,
    replay_table,
    summarise,
)
from cachelora.schemas import PAIRS, REPLAY, THRESHOLDS
from cachelora.text import trivial_key

SETTINGS = Evaluate(bootstrap=200)


def pairs(*rows):
    """Labelled pairs of (query, other, same answer, part)."""
    values = [(f"{n}", q, o, same, "topic", f"{n}", part) for n, (q, o, same, part) in enumerate(rows)]
    return pd.DataFrame(values, columns=PAIRS.names)


def many(intents, part="test", prefix="q"):
    """An anchor, a positive and a negative for each of so many intents."""
    rows = []
    for number in range(intents):
        rows += [
            (f"{prefix}{number}", f"{prefix}{number} again", True, part),
            (f"{prefix}{number}", f"not {prefix}{number}", False, part),
        ]
    return pairs(*rows)


def on_circle(*degrees):
    """Unit vectors at angles, in two dimensions."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_a_cache_by_hand():
    # 0 is stored; 10 hits it; 40 misses and is stored; 30 is nearer to 40; 0 comes again.
    vectors = on_circle(0, 10, 40, 30)
    found = replay(vectors, np.array([0, 1, 2, 3, 0]), np.cos(np.radians(15)))
    assert found.hit.tolist() == [False, True, False, True, True]
    assert found.nearest.tolist() == [-1, 0, 0, 2, 0]
    assert np.isnan(found.similarity[0])
    assert found.similarity[1:] == pytest.approx(np.cos(np.radians([10, 40, 10, 0])), abs=1e-6)


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.95, 0.99])
def test_a_query_hits_or_is_stored_however_near_the_threshold(threshold):
    # A hair below the threshold in float32: what it did not answer, it holds.
    near = np.float32(threshold - 1e-6)
    vectors = np.array([[1, 0], [near, np.sqrt(1 - near**2)]], dtype=np.float32)
    hits = replay(vectors, np.array([0, 1, 1, 1]), threshold).hit
    assert hits[2:].all()


def test_what_hits_is_not_stored():
    # 10 was answered by 0 and is not in the cache, so 20 finds 0, which is too far.
    found = replay(on_circle(0, 10, 20), np.array([0, 1, 2]), np.cos(np.radians(15)))
    assert found.hit.tolist() == [False, True, False]
    assert found.nearest.tolist() == [-1, 0, 0]


def one_at_a_time(vectors, rows, threshold):
    """The same cache in plain NumPy."""
    stored, hits, nearest = [], [], []
    for row in rows:
        cosines = vectors[stored] @ vectors[row]
        best = int(cosines.argmax()) if stored else -1
        nearest.append(stored[best] if stored else -1)
        hits.append(bool(stored) and cosines[best] >= threshold)
        if not hits[-1]:
            stored.append(row)
    return hits, nearest


@given(st.integers(0, 2**32 - 1), st.integers(1, 2500), st.integers(1, 60), st.floats(-0.5, 0.99))
def test_queries_that_are_looked_up_together_meet_one_another(seed, queries, texts, threshold):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(texts, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = random.integers(texts, size=queries)
    cosines = vectors @ vectors.T
    # Away from what float32 cannot tell apart.
    threshold += 1e-4 if np.abs(cosines - threshold).min() < 1e-5 else 0
    found = replay(vectors, rows, threshold)
    if np.abs(cosines - threshold).min() > 1e-5:
        hits, nearest = one_at_a_time(vectors, rows, threshold)
        assert found.hit.tolist() == hits
        assert found.nearest.tolist() == nearest


@given(st.integers(0, 2**32 - 1), st.integers(1, 500), st.floats(-1, 1))
def test_the_same_words_always_hit_and_nothing_does_above_one(seed, queries, threshold):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(20, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = random.integers(20, size=queries)
    again = pd.Series(rows).duplicated().to_numpy()
    assert replay(vectors, rows, threshold).hit[again].all()
    assert not replay(vectors, rows, 1.01).hit.any()


@given(st.integers(0, 2**32 - 1), st.floats(-0.9, 1), st.floats(-0.9, 1))
def test_without_likeness_between_answers_a_higher_threshold_never_adds_a_hit(seed, one, other):
    # Texts of one answer are near one another, those of different answers opposite or at right angles.
    random = np.random.default_rng(seed)
    vectors = np.repeat(np.eye(6, dtype=np.float32), 3, axis=0)
    classes, rows = np.repeat(np.arange(6), 3), random.integers(18, size=80)
    low, high = (replay(vectors, rows, threshold) for threshold in sorted((one, other)))
    assert low.hit.sum() >= high.hit.sum()
    if max(one, other) > 1e-3:
        right = classes[rows] == classes[high.nearest]
        assert right[high.hit].all()


def test_vectors_that_are_not_numbers_are_refused():
    with pytest.raises(ModelError, match="its embeddings are not all numbers"):
        replay(np.array([[np.nan, 1]], dtype=np.float32), np.array([0]), 0.5)


def test_twenty_thousand_queries_are_decided_in_seconds():
    random = np.random.default_rng(1)
    vectors = random.normal(size=(20_000, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    started = time.process_time()
    assert not replay(vectors, np.arange(20_000), 0.9).hit.any()
    assert time.process_time() - started < 30


@given(
    st.integers(1, 300), st.floats(0, 3), st.floats(0, 0.6), st.floats(0, 0.4), st.integers(0, 2**32 - 1),
    st.integers(1, 30),
)  # fmt: skip
def test_the_form_of_a_query_says_what_came_before(queries, exponent, rewordings, look_alikes, seed, intents):
    settings = Replay(queries=queries, exponent=exponent, paraphrase_share=rewordings, look_alike_share=look_alikes)
    table = many(intents)
    stream = draw_stream({"toy": table}, settings, seed)
    assert len(stream.events) == queries
    wording_of = {text: name.removesuffix(" again") for name in table["query"] for text in (name, f"{name} again")}
    asked, words = set(), set()
    for event in stream.events.itertuples():
        text = stream.texts[event.row]
        expected = REPEAT if text in words else LOOK_ALIKE if text.startswith("not ") else NEW
        if expected == NEW and wording_of[text] in asked:
            expected = REWORDED
        assert event.form == expected
        if text in wording_of:
            asked.add(wording_of[text])
        words.add(text)
    assert set(stream.texts) == words
    again = draw_stream({"toy": table}, settings, seed)
    assert again.texts == stream.texts
    assert again.events.equals(stream.events)


def test_the_stream_of_a_seed_is_known():
    stream = draw_stream({"toy": many(5)}, Replay(queries=12), 13)
    said = [f"{event.form}: {stream.texts[event.row]}" for event in stream.events.itertuples()]
    assert said == [
        "new: q4", "new: q3", "paraphrase: q4 again", "repeat: q4", "repeat: q4 again", "new: q2 again",
        "repeat: q4 again", "repeat: q3", "new: q0", "paraphrase: q3 again", "new: q1 again", "paraphrase: q1",
    ]  # fmt: skip
    other = draw_stream({"toy": many(5)}, Replay(queries=12), 14)
    assert [other.texts[row] for row in other.events["row"]] != [stream.texts[row] for row in stream.events["row"]]


def test_popularity_falls_with_the_rank():
    stream = draw_stream({"toy": many(50)}, Replay(queries=20_000, exponent=1.0), 1)
    asked = stream.events["intent"].value_counts().to_numpy()
    expected = 20_000 / np.arange(1, 51) / (1 / np.arange(1, 51)).sum()
    assert asked[:5] == pytest.approx(expected[:5], rel=0.1)
    level = draw_stream({"toy": many(50)}, Replay(queries=20_000, exponent=0), 1).events["intent"].value_counts()
    assert level.min() > 300


def test_no_text_of_a_calibration_part_comes_not_of_another_domain_either():
    first = pd.concat([many(20, "calibration", "c"), many(20)])
    # The other domain tests on a text that the first one calibrates on, in other spelling.
    second = pairs(
        ("C3?", "see three", True, "test"), ("other", "others", True, "test"), ("other", "no", False, "test")
    )
    stream = draw_stream({"first": first, "second": second}, Replay(queries=3000), 1)
    calibrated = {
        trivial_key(text) for name in ("query", "other") for text in first.loc[first["part"] == "calibration", name]
    }
    assert not calibrated & {trivial_key(text) for text in stream.texts}
    assert stream.left_out == 1
    assert set(stream.events["test_set"]) == {"first", "second"}


def test_texts_that_positives_join_have_one_answer_across_domains():
    one = pairs(("a", "b", True, "test"), ("a", "x", False, "test"))
    # B? is b; the negative of d is a text of the same class as c, and of another than d.
    two = pairs(("c", "B?", True, "test"), ("d", "e", True, "test"), ("d", "A", False, "test"))
    # Not labelled so by the pair, but by the others: b and c have one answer.
    three = pairs(("b", "c", False, "test"))
    stream = draw_stream({"one": one, "two": two, "three": three}, Replay(queries=2000, look_alike_share=0.5), 1)
    answer = dict(zip(stream.texts, stream.classes, strict=True))
    assert set(answer) == {"a", "b", "x", "c", "B?", "d", "e", "A"}
    assert len({answer[text] for text in ("a", "b", "B?", "c", "A")}) == 1
    assert answer["d"] == answer["e"]
    assert len({answer[text] for text in ("a", "d", "x")}) == 3
    assert stream.left_out == 1


def test_without_pairs_to_test_on_there_is_no_stream():
    with pytest.raises(InputError, match="no pair of the test part is left for the replay"):
        draw_stream({"toy": many(3, "calibration")}, Replay(), 1)


def thresholds(*rows):
    """A table of thresholds with (test_set, fitted_on, budget, threshold), everything else 0."""
    names = ("test_set", "fitted_on", "budget", "threshold")
    zeros = {name: 0 for name in THRESHOLDS.names if name not in names}
    return pd.DataFrame([dict(zip(names, row, strict=True)) | zeros for row in rows])


def test_the_thresholds_of_all_domains_are_replayed():
    table = thresholds(
        ("law", "own", 0.05, 0.7),
        ("all domains", "all", 0.005, None),
        ("all domains", "all", 0.05, 0.9),
        ("all domains", "fixed", None, 0.8),
    )
    assert choices_of(table) == [
        Choice("0.5 % false hits", 0.005, None),
        Choice("5 % false hits", 0.05, 0.9),
        Choice("fixed 0.80", None, 0.8),
    ]


def toy_stream():
    """Four texts, of which the first two have one answer, in five queries of two intents."""
    events = [(0, NEW, "i", "law"), (1, REWORDED, "i", "law"), (2, LOOK_ALIKE, "i", "law"), (3, NEW, "j", "medical"),
              (2, REPEAT, "i", "law")]  # fmt: skip
    return Stream(
        ["a", "b", "x", "c"],
        np.array([0, 0, 1, 2]),
        pd.DataFrame(events, columns=["row", "form", "intent", "test_set"]),
        0,
    )


def toy_decisions():
    return Decisions(
        np.array([np.nan, 0.9, 0.85, 0.1, 0.85]),
        np.array([-1, 0, 0, 0, 0]),
        np.array([False, True, True, False, True]),
    )


def test_hits_are_right_where_the_answer_is_that_of_the_stored_query(tmp_path):
    choice = Choice("fixed 0.80", None, 0.8)
    table = replay_table(toy_stream(), toy_decisions(), choice)
    assert table["outcome"].tolist() == [MISS, HIT, FALSE_HIT, MISS, FALSE_HIT]
    assert table["nearest"].tolist() == ["", "a", "a", "a", "a"]
    write_table(tmp_path / "r.parquet", table, REPLAY)
    assert read_table(tmp_path / "r.parquet", REPLAY)["similarity"].isna().tolist() == [True] + [False] * 4
    summary = summarise(table, choice, SETTINGS, 1)
    assert [summary[name] for name in ("queries", "hits", "false_hits", "misses")] == [5, 1, 2, 2]
    assert summary["hit_ratio"] == pytest.approx(0.6)
    assert summary["calls_saved"] == pytest.approx(0.2)
    assert summary["false_hit_share"] == pytest.approx(0.4)
    assert summary["false_hits_of_hits"] == pytest.approx(2 / 3)
    # Two intents are too few for an interval.
    assert summary["hit_ratio_low"] is None
    assert summary["by_form"]["repeat"] == {"queries": 1, "hits": 0, "false_hits": 1, "misses": 0}
    assert summary["by_test_set"]["medical"]["misses"] == 1
    assert summary["over_time"][-1] == {
        "queries": 5, "hit_ratio": pytest.approx(0.6), "calls_saved": pytest.approx(0.2),
        "false_hit_share": pytest.approx(0.4),
    }  # fmt: skip
    assert [point["hit_ratio"] for point in summary["over_time"]] == pytest.approx([0, 0.5, 2 / 3, 0.5, 0.6])


def test_a_stream_is_described():
    said = describe_stream(toy_stream())
    assert said == {
        "queries": 5, "distinct_texts": 4, "intents": 2, "left_out_pairs": 0,
        "by_form": {"new": 2, "repeat": 1, "paraphrase": 1, "look-alike": 1},
        # b needs the answer of a, and x comes twice.
        "best_hit_ratio": pytest.approx(0.4),
    }  # fmt: skip


def test_the_frontier_is_the_replay_at_each_threshold():
    stream = draw_stream({"law": many(30)}, Replay(queries=300), 3)
    random = np.random.default_rng(3)
    vectors = random.normal(size=(len(stream.texts), 8)).astype(np.float32) + 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    points = frontier(stream, vectors)
    assert [points[0]["threshold"], points[-1]["threshold"]] == [0.5, 1.0]
    for point in points:
        choice = Choice("x", None, point["threshold"])
        decisions = replay(vectors, stream.events["row"].to_numpy(), point["threshold"])
        found = summarise(replay_table(stream, decisions, choice), choice, SETTINGS, 1)
        for name in ("hit_ratio", "calls_saved", "false_hit_share"):
            assert point[name] == pytest.approx(found[name])
    # At 1 only the same words hit.
    assert points[-1]["false_hit_share"] == 0
    assert points[-1]["calls_saved"] == pytest.approx((stream.events["form"] == REPEAT).mean())


@given(st.integers(0, 2**32 - 1), st.floats(-1, 1.1), st.integers(1, 400))
def test_hits_false_hits_and_misses_are_all_queries(seed, threshold, queries):
    stream = draw_stream({"toy": many(15)}, Replay(queries=queries), seed)
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(len(stream.texts), 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    choice = Choice("fixed", None, threshold)
    table = replay_table(stream, replay(vectors, stream.events["row"].to_numpy(), threshold), choice)
    summary = summarise(table, choice, SETTINGS, 1)
    for part in (summary, *summary["by_form"].values(), *summary["by_test_set"].values()):
        assert part["hits"] + part["false_hits"] + part["misses"] == part["queries"]
    assert sum(part["queries"] for part in summary["by_form"].values()) == queries
    assert summary["calls_saved"] + summary["false_hit_share"] == pytest.approx(summary["hit_ratio"])
    for name in ("hit_ratio", "calls_saved", "false_hit_share", "false_hits_of_hits"):
        if summary[f"{name}_low"] is not None:
            assert summary[f"{name}_low"] <= summary[f"{name}_high"]
    assert summary["calls_saved"] <= describe_stream(stream)["best_hit_ratio"] + 1e-12


def test_intervals_are_over_intents():
    # Twenty intents of ten queries: in one half all hit, in the other none does. As single queries they would say more.
    rows = [(f"i{n}", HIT if n < 10 else MISS) for n in range(20) for _ in range(10)]
    table = pd.DataFrame(rows, columns=["intent", "outcome"]).assign(form=NEW, test_set="law")
    summary = summarise(table, Choice("fixed", None, 0.8), Evaluate(bootstrap=2000), 1)
    # The standard error of a share of one half of 20.
    assert summary["hit_ratio_low"] == pytest.approx(0.5 - 1.96 * np.sqrt(0.25 / 20), abs=0.05)
    assert summary["hit_ratio_high"] == pytest.approx(0.5 + 1.96 * np.sqrt(0.25 / 20), abs=0.05)
    # Nothing hits falsely in any draw, which is no bound.
    assert summary["false_hit_share"] == 0
    assert summary["false_hit_share_low"] is None and summary["false_hit_share_high"] is None


def test_latencies_are_milliseconds_of_single_queries(base):
    model = load_model(base, None)
    texts = [f"query number {number}" for number in range(12)]
    vectors = model.encode(texts, normalize_embeddings=True)
    found = latencies(model, texts, vectors, np.arange(7))
    assert (found["timed_queries"], found["index_size"]) == (12, 7)
    for name in ("encode", "search"):
        assert 0 < found[f"{name}_ms_p50"] <= found[f"{name}_ms_p95"] < 60_000
    assert found["search_ms_p50"] < found["encode_ms_p50"]


def test_shares_of_more_than_all_are_refused(default_config):
    config = default_config.model_dump(mode="json", exclude_defaults=True)
    with pytest.raises(ConfigError, match="paraphrase_share and look_alike_share are more than 1 together"):
        parse(config | {"replay": {"paraphrase_share": 0.7, "look_alike_share": 0.4}})
