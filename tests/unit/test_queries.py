import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachelora.config import Queries
from cachelora.errors import InputError
from cachelora.files import write_rejects
from cachelora.queries import group_queries, read_queries, split_groups
from cachelora.text import normalise, trivial_key

words = st.lists(st.text(alphabet="abcXY ?.", min_size=1, max_size=8).map(normalise).filter(trivial_key), max_size=40)


def test_bad_records_are_set_aside_with_their_reasons(tmp_path):
    path = tmp_path / "q.jsonl"
    queries = ["what is gout", None, 7, " ?! ", "x" * 30, "ok", "half \ud800"]
    lines = [{"query": query} for query in queries]
    lines[1] = {"q": "x"}
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    queries, rejects = read_queries(path, Queries(max_reject_share=0.75, max_chars=20))
    assert queries == ["what is gout", "ok"]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (2, "no key 'query' (found: q)"),
        (3, "'query' is int, not text"),
        (4, "'query' holds no word"),
        (5, "'query' has 30 characters, more than queries.max_chars = 20"),
        (7, "holds half a character (an unpaired surrogate)"),
    ]
    write_rejects(tmp_path / "rejects.jsonl", rejects)
    assert len((tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    with pytest.raises(InputError, match="line 2: no key 'query'"):
        read_queries(path, Queries(max_reject_share=0.5, max_chars=20))


@given(words)
def test_grouping_loses_no_query_and_mixes_none(queries):
    table = group_queries(queries)
    assert table["count"].sum() == len(queries)
    assert sorted(table["query"]) == sorted(set(queries))
    for _, members in table.groupby("group"):
        assert members["query"].map(trivial_key).nunique() == 1
        assert members["canonical"].sum() == 1
        assert members["canonical"].iloc[0]
    assert table["group"].nunique() == len({trivial_key(query) for query in queries})


@given(st.integers(4, 60), st.integers(0, 5), st.booleans())
def test_splits_are_by_group_and_of_the_configured_size(number, seed, hold_out_test):
    queries = [f"query {i}" for i in range(number)] + [f"Query {i}?" for i in range(number)]
    settings = Queries(validation_share=0.25, test_share=0.25)
    table = split_groups(group_queries(queries), settings, seed, hold_out_test, "q")
    assert len(table) == 2 * number
    assert (table.groupby("group")["split"].nunique() == 1).all()
    sizes = table.drop_duplicates("group")["split"].value_counts()
    assert sizes["validation"] == -(-number // 4)
    assert sizes.get("test", 0) == (-(-number // 4) if hold_out_test else 0)


def test_one_query_more_moves_few_others():
    queries = [f"query {i}" for i in range(200)]
    before = split_groups(group_queries(queries), Queries(), 1, False, "q").set_index("query")["split"]
    after = split_groups(group_queries([*queries, "one more"]), Queries(), 1, False, "q").set_index("query")["split"]
    assert (before != after[before.index]).sum() <= 1


def test_max_queries_draws_whole_groups():
    queries = [f"query {i}" for i in range(50)] + ["QUERY 3"]
    table = split_groups(group_queries(queries), Queries(max_queries=10), 1, False, "q")
    assert table["group"].nunique() == 10


def test_a_larger_share_trains_on_more_and_leaves_the_other_splits_alone():
    queries = group_queries([f"query {i}" for i in range(100)])
    sizes, last = [], set()
    for share in (0.1, 0.25, 0.5, 1.0):
        table = split_groups(queries, Queries(train_share=share), 1, True, "q")
        groups = {split: set(rows["group"]) for split, rows in table.groupby("split")}
        assert last <= groups["train"]
        sizes.append(len(groups["train"]))
        last = groups["train"]
        assert len(groups["validation"]) == len(groups["test"]) == 15
        if share == 0.1:
            held_out = groups["validation"], groups["test"]
        assert (groups["validation"], groups["test"]) == held_out
    assert sizes == [7, 18, 35, 70]


def test_too_few_queries_are_refused():
    with pytest.raises(InputError, match="q: 1 distinct queries are too few to split\\. Give more"):
        split_groups(group_queries(["one", "ONE?"]), Queries(), 1, False, "q")
