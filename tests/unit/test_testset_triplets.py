import dataclasses
import json
import re
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachelora.config import Queries
from cachelora.errors import InputError
from cachelora.files import sha256_of, write_table
from cachelora.queries import group_queries, split_groups
from cachelora.schemas import FILTERED, KINDS, PARAPHRASE, TRIPLETS, VERDICTS
from cachelora.testset import Frozen, drop_trained_on, frozen_version, make_pairs, read_lock, read_testset
from cachelora.testset import testset_from_groups as from_groups
from cachelora.train.validation import read_validation
from cachelora.triplets import by_words_alone, drop_test_copies, kept_texts, make_groups, make_triplets
from cachelora.triplets.card import DataCard


def queries_table(queries, hold_out_test=False):
    return split_groups(group_queries(queries), Queries(validation_share=0.2), 1, hold_out_test, "q")


def filtered_table(rows):
    """Rows of query_id, kind, text and, where it is dropped, reasons."""
    rows = [(*row[:3], "llm", 0.5, list(row[3]) if len(row) > 3 else []) for row in rows]
    return pd.DataFrame(rows, columns=FILTERED.names)


QUERIES = [f"how to treat disease number {i}" for i in range(10)]


def written_for(table, paraphrases=2, negatives=3):
    rows = []
    for row in table[table["canonical"]].itertuples():
        rows += [(row.query_id, PARAPHRASE, f"therapy {k} against {row.query}") for k in range(paraphrases)]
        rows += [(row.query_id, KINDS[k % 5], f"why not {k} {row.query}") for k in range(negatives)]
    return filtered_table(rows)


def seed_003(data):
    """The algorithm of seed document 003 ("Convert to triplet format"), word for word but for its files."""
    positive_groups = {}
    for item in data:
        if "positive" in item:
            positive = item["positive"]
            if positive not in positive_groups:
                positive_groups[positive] = {"paraphrases": [], "negatives": []}
            positive_groups[positive]["paraphrases"].append(item["anchor"])
    for item in data:
        if "hard_negative" in item:
            anchor = item["anchor"]
            for positive, group in positive_groups.items():
                if anchor in group["paraphrases"] or anchor == positive:
                    group["negatives"].append(item["hard_negative"])
                    break
    return [
        {"anchor": para, "positive": positive, "hard_negative": neg}
        for positive, group in positive_groups.items()
        for para in group["paraphrases"]
        for neg in group["negatives"]
    ]


def test_the_product_is_that_of_seed_003():
    # The document's own numbers: 500 queries, each with 3 paraphrases and 2 negatives.
    table = queries_table([f"how to treat disease number {i}" for i in range(500)])
    texts = written_for(table, 3, 2)
    name = dict(zip(table["query_id"], table["query"], strict=True))
    data = [
        {"anchor": row.text, "positive": name[row.query_id]}
        if row.kind == PARAPHRASE
        else {"anchor": name[row.query_id], "hard_negative": row.text}
        for row in texts.itertuples()
    ]
    groups, dropped = make_groups(table, texts)
    triplets = make_triplets(groups, "product", dropped, "q")
    assert dropped == Counter()
    assert len(triplets) == 3000
    wanted = [tuple(item.values()) for item in seed_003(data)]
    assert sorted(wanted) == sorted(
        (row.anchor, row.positive, row.negatives[0]["text"]) for row in triplets.itertuples()
    )
    assert all(len(row.negatives) == 1 for row in triplets.itertuples())
    by_group = make_triplets(groups, "group", dropped, "q")
    assert len(by_group) == 1500
    assert sum(len(row.negatives) for row in by_group.itertuples()) == 3000


def test_groups_are_made_of_what_is_kept_and_the_rest_is_counted():
    table = queries_table([*QUERIES, "How to treat disease number 0?"])
    ids = table[table["canonical"]]["query_id"].tolist()
    rows = [
        (ids[0], PARAPHRASE, "cure for 0"), (ids[0], PARAPHRASE, "cure of 0", ["far"]),
        (ids[0], "aspect", "cause of 0"),
        (ids[0], "scope", "cause of 0 again", ["easy", "fragment"]), (ids[1], "aspect", "cause of 1"),
        (ids[2], PARAPHRASE, "cure for 2"), (ids[2], "aspect", "cause of 2", ["same_words"]),
    ]  # fmt: skip
    groups, dropped = make_groups(table, filtered_table(rows))
    assert [(g.paraphrases, g.negatives) for g in groups] == [(["cure for 0"], [("aspect", "cause of 0", "llm")])]
    assert dropped == {
        "query: another spelling of a query above": 1,
        "group: no paraphrase": 8,
        "group: no negative": 1,
    }


def test_the_judge_drops_what_it_is_against_and_nothing_else():
    table = queries_table(QUERIES)
    one = table["query_id"].iloc[0]
    texts = filtered_table(
        [(one, PARAPHRASE, "p1"), (one, PARAPHRASE, "p2"), (one, PARAPHRASE, "p3"), (one, "aspect", "n1"),
         (one, "scope", "n2"), (one, "scope", "n3"), (one, "entity", "n4", ["easy"])]
    )  # fmt: skip
    said = {"p1": "same", "p2": "different", "p3": "none", "n1": "different", "n2": "same", "n3": "none"}
    verdicts = pd.DataFrame([(one, text, word, "e", "m", "v") for text, word in said.items()], columns=VERDICTS.names)
    found = {row.text: list(row.reasons) for row in kept_texts(texts, verdicts).itertuples()}
    assert found == {"p1": [], "p2": ["judge"], "p3": [], "n1": [], "n2": ["judge"], "n3": [], "n4": ["easy"]}
    assert kept_texts(texts, None) is texts


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
        make_triplets(train_only, "group", Counter({"group: no paraphrase": 7}), "data/q.jsonl")


NASTY = "<script>alert(1)</script> | [x](http://evil) **`y`** www.evil.org $x$ \u202e"


def make_card(rows=(), judged=None, queries=(*QUERIES, NASTY)):
    table = queries_table(queries)
    texts = pd.concat([written_for(table), filtered_table(rows(table) if rows else [])], ignore_index=True)
    groups, dropped = make_groups(table, texts)
    triplets = make_triplets(groups, "group", dropped, "q")
    return DataCard("x", table, texts, triplets, dropped + Counter({"some reason": 3}), judged)


def test_the_data_card_counts_everything():
    def rows(table):
        one, two = table["query_id"].iloc[:2]
        return [
            (one, PARAPHRASE, "far one", ["far"]),
            (two, "aspect", "n", ["easy", "judge"]),
            (two, "scope", "m", ["judge"]),
        ]

    card = make_card(rows, Counter(same=24, different=33))
    steps = dict(card.funnel)
    assert steps["queries, repetitions included"] == 11
    assert steps["paraphrases by the LLM"] == 23 and steps["paraphrases that the filters keep"] == 22
    assert steps["negatives by the LLM"] == 35 and steps["negatives that the filters keep"] == 34
    assert steps["negatives that the judge keeps too"] == 33
    assert steps["groups kept for training"] + steps["groups kept for validation"] == 11
    assert steps["triplet rows for training"] + steps["triplet rows for validation"] == 22
    assert {(reason.partition(":")[0], *rest) for reason, *rest in card.reasons} == {
        ("far", PARAPHRASE, 1, 1),
        ("easy", "negative", 1, 0),
        ("judge", "negative", 2, 1),
    }
    assert dict((kind, (written, kept)) for kind, written, kept in card.kinds)["aspect"] == (12, 11)
    shown = card.markdown()
    assert "| some reason | 3 |" in shown
    assert len(card.examples(True)) == 20
    assert sorted(example["text"] for example in card.examples(False)) == ["far one", "m", "n"]
    assert make_card(rows, card.judged).html() == card.html()


def test_the_data_card_shows_texts_as_they_are_and_runs_none():
    card = make_card(queries=[NASTY, *(f"{NASTY} {i}" for i in range(9))])
    page = card.html()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.findall(r"(?:src|href|action)=.(?!#)|url\((?!#)|@import", page)
    shown = card.markdown()
    assert (
        "<script" not in shown and "\\[x\\]\\(http\\://evil" in shown and "www\\.evil" in shown and "\\$x\\$" in shown
    )
    assert "\u202e" not in shown + page and "\\|" in shown
    # Every row of a table has as many cells as its head.
    for block in shown.split("\n\n"):
        if block.startswith("| "):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_the_data_card_warns_of_what_looks_wrong():
    def rows(table):
        return [(query_id, PARAPHRASE, f"lost {n}", ["far"]) for query_id in table["query_id"] for n in range(2)]

    assert not [warning for warning in make_card().warnings if "dropped" in warning]
    found = " / ".join(make_card(rows, Counter(same=5, none=50)).warnings)
    assert "22 of 44 paraphrases are dropped" in found
    assert "one reason drops 22 of 44 paraphrases (far: too far from the query)" in found
    assert "0 of 33 negatives kept are of the kind scope" in found
    assert "the judge said nothing on 50 of 55 texts" in found
    assert "it may not know" in " ".join(make_card(judged=Counter(same=50)).warnings)


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
    groups, _ = make_groups(table, filtered_table(rows))
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
    others = {"law": make_triplets(groups, "group", dropped, "q"), "tax": make_triplets(groups, "group", dropped, "q")}
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


def test_a_made_negative_that_stands_in_a_test_set_goes_alone():
    table = queries_table(QUERIES)
    one, two = table["query_id"].iloc[:2]
    texts = filtered_table([(one, PARAPHRASE, "p"), (one, "aspect", "n"), (two, PARAPHRASE, "q"), (two, "aspect", "m")])
    made = pd.DataFrame(
        [(one, "polarity", "tested text", "rule", 0.5, []), (two, "mined", "tested text", "mined", 0.5, [])],
        columns=FILTERED.names,
    )
    groups, _ = make_groups(table, pd.concat([texts, made], ignore_index=True))
    testset = pd.DataFrame({"anchor": ["Tested text?"], "positive": ["x"], "negative": ["y"]})
    kept, dropped = drop_test_copies(groups, [testset], 0.9)
    assert [group.negatives for group in kept] == [[("aspect", "n", "llm")], [("aspect", "m", "llm")]]
    assert dropped == {"negative, rule-made or mined: a test text or a near copy of one": 2}


def test_a_test_set_does_not_hang_on_the_base_model():
    table = queries_table(QUERIES)
    one = table["query_id"].iloc[0]
    texts = filtered_table(
        [
            (one, PARAPHRASE, "p", ["far"]),
            (one, PARAPHRASE, "q", ["number"]),
            (one, "aspect", "n", ["easy", "elsewhere"]),
        ]
    )
    assert by_words_alone(texts)["reasons"].tolist() == [[], ["number"], []]


@given(st.sampled_from(["group", "product"]), st.integers(1, 3), st.integers(1, 4))
def test_validation_is_the_same_however_triplets_are_grouped(tmp_path_factory, grouping, paraphrases, negatives):
    table = queries_table(QUERIES).assign(split="validation")
    groups, _ = make_groups(table, written_for(table, paraphrases, negatives))
    groups.append(dataclasses.replace(groups[0], split="train", group="other"))
    path = tmp_path_factory.mktemp("v") / "x.parquet"
    write_table(path, make_triplets(groups, grouping, Counter(), "q"), TRIPLETS)
    found = read_validation(path, 100)
    easy = (found["kind"] == "topic").sum()
    assert easy == 2 * paraphrases * (len(QUERIES) - 1)
    assert len(found) - easy == 2 * paraphrases * negatives * len(QUERIES)
