import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachelora.config import Queries
from cachelora.errors import InputError
from cachelora.files import sha256_of
from cachelora.queries import group_queries, split_groups
from cachelora.schemas import AUGMENTED, KINDS, PARAPHRASE
from cachelora.testset import Frozen, drop_trained_on, frozen_version, make_pairs, read_lock, read_testset
from cachelora.testset import testset_from_groups as from_groups
from cachelora.text import trivial_key
from cachelora.triplets import data_card, drop_test_copies, make_groups, make_triplets


def queries_table(queries, hold_out_test=False):
    return split_groups(group_queries(queries), Queries(validation_share=0.2), 1, hold_out_test, "q")


def augmented_table(rows):
    return pd.DataFrame([(*row, "recorded", "m", "v") for row in rows], columns=AUGMENTED.names)


QUERIES = [f"how to treat disease number {i}" for i in range(10)]


def written_for(table, paraphrases=2, negatives=3):
    rows = []
    for row in table[table["canonical"]].itertuples():
        rows += [(row.query_id, PARAPHRASE, f"therapy {k} against {row.query}") for k in range(paraphrases)]
        rows += [(row.query_id, KINDS[k % 5], f"why not {k} {row.query}") for k in range(negatives)]
    return augmented_table(rows)


def test_grouping_is_that_of_seed_003():
    # The document's own numbers: each query with 3 paraphrases and 2 negatives.
    table = queries_table(QUERIES)
    groups, dropped = make_groups(table, written_for(table, 3, 2))
    triplets = make_triplets(groups, dropped, "q")
    assert dropped == Counter()
    assert len(triplets) == 30
    assert sum(len(row.negatives) for row in triplets.itertuples()) == 60
    for row in triplets.itertuples():
        assert row.positive in QUERIES
        assert row.anchor.endswith(row.positive)
        assert all(negative["text"].endswith(row.positive) for negative in row.negatives)


def test_everything_dropped_is_counted():
    table = queries_table([*QUERIES, "How to treat disease number 0?"])
    ids = table[table["canonical"]]["query_id"].tolist()
    query = table[table["canonical"]]["query"].tolist()
    rows = [
        (ids[0], PARAPHRASE, "cure for 0"), (ids[0], PARAPHRASE, "Cure for 0!"), (ids[0], PARAPHRASE, query[0].upper()),
        (ids[0], "aspect", "cause of 0"), (ids[0], "scope", "cause of 0."), (ids[0], "entity", "cure for 0"),
        (ids[1], "aspect", "cause of 1"),
        (ids[2], PARAPHRASE, "cure for 2"),
    ]  # fmt: skip
    groups, dropped = make_groups(table, augmented_table(rows))
    assert [(g.paraphrases, g.negatives) for g in groups] == [(["cure for 0"], [("aspect", "cause of 0")])]
    assert dropped == {
        "query: another spelling of a query above": 1,
        "paraphrase: same words as another paraphrase": 1,
        "paraphrase: same words as the query": 1,
        "negative: same words as another negative": 1,
        "negative: same words as another paraphrase": 1,
        "group: no paraphrase": 8,
        "group: no negative": 1,
    }


@given(st.data())
def test_no_negative_is_also_an_equivalent_text(data):
    texts = st.text(alphabet="ab ?", min_size=1, max_size=3)
    table = queries_table(["aa", "bb", "ab", "ba"])
    rows = [
        (query_id, data.draw(st.sampled_from([PARAPHRASE, *KINDS])), data.draw(texts))
        for query_id in table["query_id"]
        for _ in range(data.draw(st.integers(0, 5)))
    ]
    groups, dropped = make_groups(table, augmented_table(rows))
    for group in groups:
        keys = [trivial_key(text) for text in group.texts]
        assert len(set(keys)) == len(keys)
    kept = sum(len(group.texts) - 1 for group in groups)
    lost_groups = dropped["group: no paraphrase"] + dropped["group: no negative"]
    assert len(groups) + lost_groups == 4
    assert kept <= len(rows)


def test_a_group_with_a_test_text_or_a_near_copy_is_dropped_and_counted():
    table = queries_table(QUERIES)
    groups, _ = make_groups(table, written_for(table))
    testset = pd.DataFrame(
        {
            "anchor": ["Therapy 1 against how to treat disease number 3?"],
            "positive": ["x y z"],
            "negative": ["unrelated"],
        }
    )
    kept, dropped = drop_test_copies(groups, [testset], 1.0)
    assert [group.query for group in groups if group not in kept] == ["how to treat disease number 3"]
    assert dropped == {"group: holds a test text or a near copy of one": 1}
    near = testset.assign(anchor=["therapy 1 against how to treat disease numbers 3"])
    assert "how to treat disease number 3" not in [group.query for group in drop_test_copies(groups, [near], 0.75)[0]]
    assert drop_test_copies(groups, [], 0.5) == (groups, Counter())


def test_nothing_left_is_an_error_that_names_the_file():
    table = queries_table(QUERIES)
    groups, _ = make_groups(table, written_for(table))
    train_only = [group for group in groups if group.split == "train"]
    with pytest.raises(
        InputError,
        match=r"data/q\.jsonl: no group is left in the validation split; dropped: group: no paraphrase \(7\)",
    ):
        make_triplets(train_only, Counter({"group: no paraphrase": 7}), "data/q.jsonl")


def test_data_card_counts_and_shows_no_text():
    table = queries_table([*QUERIES, "<script>alert(1)</script>"])
    augmented = written_for(table)
    groups, dropped = make_groups(table, augmented)
    card = data_card("x", table, augmented, make_triplets(groups, dropped, "q"), dropped + Counter({"some reason": 3}))
    assert "* groups: 11" in card
    assert "* paraphrases written: 22" in card
    assert "* aspect: 11" in card
    assert "* some reason: 3" in card
    assert "script" not in card


def test_test_file_is_checked_line_by_line(tmp_path):
    path = tmp_path / "test.jsonl"
    good = {"anchor": "a b", "positive": "c d", "negative": "e f", "kind": "scope", "subfield": "x"}
    lines = [
        good,
        good | {"kind": "hard"},
        good | {"positive": ""},
        good | {"negative": "A b?"},
        good,
        good | {"anchor": "z"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    table, rejects = read_testset(path, 0.7, "v1")
    assert table["anchor"].tolist() == ["a b", "z"]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (2, f"kind 'hard' is none of {', '.join(KINDS)}"),
        (3, "no text under 'positive'"),
        (4, "two of its three texts are the same"),
        (5, "the same triplet stands above"),
    ]
    with pytest.raises(InputError, match="line 2: kind 'hard'"):
        read_testset(path, 0.1, "v1")


def test_a_domain_without_a_test_file_is_tested_on_its_own_held_out_groups():
    table = queries_table(QUERIES, hold_out_test=True)
    held_out = table[table["split"] == "test"]
    groups, _ = make_groups(held_out, written_for(table))
    testset = from_groups(groups, "q")
    assert set(testset["anchor"]) == set(held_out["query"])
    assert len(testset) == 3 * len(held_out)
    (version,) = set(testset["test_version"])
    assert version.startswith("held out:")
    assert set(from_groups(groups[1:], "q")["test_version"]) != {version}
    assert testset["test_id"].is_unique
    with pytest.raises(InputError, match="q: no triplet is left in the test split"):
        from_groups([], "q")


def write_triplets(path, triplets):
    rows = [dict(zip(("anchor", "positive", "negative"), texts, strict=True)) | {"kind": "scope"} for texts in triplets]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_triplets_that_share_a_text_share_a_group(tmp_path):
    write_triplets(
        tmp_path / "t.jsonl",
        [
            ("a 1", "b 1", "c 1"),
            ("d 1", "e 1", "f 1"),
            ("g 1", "E 1?", "h 1"),
            ("i 1", "j 1", "g 1"),
            ("a 1", "k", "l"),
        ],
    )
    table, _ = read_testset(tmp_path / "t.jsonl", 0.0, "v1")
    first, second, third, fourth, fifth = table["group"]
    assert first == fifth
    assert second == third == fourth
    assert first != second


@settings(deadline=None)  # it writes a file
@given(
    triplets=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3, unique=True), min_size=2, max_size=15),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 5),
)
def test_pairs_are_labelled_as_their_triplets_and_no_text_is_in_both_parts(tmp_path_factory, triplets, share, seed):
    path = tmp_path_factory.mktemp("pairs") / "t.jsonl"
    write_triplets(path, [[f"text {number}" for number in texts] for texts in triplets])
    table, rejects = read_testset(path, 1.0, "v1")
    assert len(table) + len(rejects) == len(triplets)
    pairs = make_pairs(table, share, seed)
    assert pairs["pair_id"].is_unique
    expected = {(row.anchor, row.positive): True for row in table.itertuples()}
    expected |= {(row.anchor, row.negative): False for row in table.itertuples()}
    assert {(row.query, row.other): row.same_answer for row in pairs.itertuples()} == expected
    check_parts(pairs)


def test_pairs_of_held_out_groups_share_no_text_between_the_parts():
    table = queries_table(QUERIES, hold_out_test=True)
    rows = [(row.query_id, PARAPHRASE, f"as {row.query}") for row in table.itertuples()]
    # Each group's negative is the next group's query: all are connected but the last two.
    rows += [
        (row.query_id, "aspect", QUERIES[number + 1] if number < 7 else f"else {number}")
        for number, row in enumerate(table.itertuples())
    ]
    groups, _ = make_groups(table, augmented_table(rows))
    pairs = make_pairs(from_groups(groups, "q"), 0.5, 1)
    assert pairs["group"].nunique() == 3
    check_parts(pairs)
    assert set(pairs["part"]) == {"calibration", "test"}
    single = make_pairs(from_groups(groups[-1:], "q"), 0.9, 1)
    assert set(single["part"]) == {"test"}


def test_a_pair_with_both_labels_is_set_aside(tmp_path):
    write_triplets(
        tmp_path / "t.jsonl",
        [("a 1", "b 1", "c 1"), ("d 1", "e 1", "f 1"), ("C 1", "g 1", "a 1?"), ("c 1", "a 1", "h 1")],
    )
    table, rejects = read_testset(tmp_path / "t.jsonl", 1.0, "v1")
    assert len(table) == 3
    assert [(reject.line, reject.reason) for reject in rejects] == [(4, "one of its pairs has the other label above")]


def check_parts(pairs):
    parts = {
        part: {text for row in rows.itertuples() for text in (row.query, row.other)}
        for part, rows in pairs.groupby("part")
    }
    assert not parts.get("calibration", set()) & parts["test"]
    groups = pairs.groupby("part")["group"].nunique()
    assert groups["test"] >= 1


def test_a_frozen_test_set_is_refused_when_it_changes(tmp_path):
    path = tmp_path / "t.jsonl"
    write_triplets(path, [("a 1", "b 1", "c 1")])
    version = frozen_version(path, None)
    assert version.startswith("sha256:")
    frozen = Frozen(version=3, sha256=sha256_of(path))
    assert frozen_version(path, frozen) == "v3"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert frozen_version(path, None) != version
    with pytest.raises(InputError, match=r"it is not the version 3 that was frozen .*data-check --freeze"):
        frozen_version(path, frozen)


@pytest.mark.parametrize("content", ["", "[]", '{"t.jsonl": {"version": 0, "sha256": "%s"}}' % ("0" * 64), '{"t": {}}'])
def test_a_lock_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "lock.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"lock\.json: it is no lock of test sets"):
        read_lock(tmp_path / "lock.json")
    with pytest.raises(InputError, match=r"nope\.json: no such file"):
        read_lock(tmp_path / "nope.json")


def test_a_later_test_set_loses_what_finished_models_were_trained_on(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [
        ("how to open a savings account", "start saving at a bank", "how to close a savings account"),
        ("what is a bond", "explain bonds to me", "what is a share"),
        ("How do I open a savings account?", "savings account, how to open one", "savings account, how to use one"),
        ("pay a bill abroad", "settle an invoice in another country", "get a bill from abroad"),
    ]
    names = ("anchor", "positive", "negative", "kind")
    path.write_text("".join(json.dumps(dict(zip(names, (*row, "aspect"), strict=True))) + "\n" for row in rows))
    table, _ = read_testset(path, 0.0, "v2")
    groups, dropped = make_groups(queries_table(QUERIES), written_for(queries_table(QUERIES)))
    others = {"law": make_triplets(groups, dropped, "q"), "tax": make_triplets(groups, dropped, "q")}
    kept, rejects = drop_trained_on(table, others, 0.75, "t")
    assert kept is table and rejects == []
    row = others["tax"].iloc[0]
    row["negatives"][0]["text"] = "How do I open a Savings Account"
    others["law"].loc[0, "positive"] = "what is a bond?"
    kept, rejects = drop_trained_on(table, others, 0.75, "t")
    assert list(kept["anchor"]) == ["pay a bill abroad"]
    assert set(kept["test_version"]) == {"v2 less 3"}
    assert [reject.reason.split()[4] for reject in rejects] == ["tax", "law", "tax"]
    assert "how to open a savings account" in rejects[0].text
    with pytest.raises(InputError, match=r"^t: the other domains were trained on a text of every triplet"):
        drop_trained_on(table[:2], others, 0.75, "t")
