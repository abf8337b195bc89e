"""The report page: what it shows of texts, times and origins."""

import html
import re

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from cachelora.benchmark import Section
from cachelora.report import Figure, Page, funnel_section, origin_section, time_section, worst_pairs
from cachelora.schemas import LABELLED, SCORES
from cachelora.text import on_one_line


def labelled(*rows):
    """Pairs of (query, other, same answer)."""
    values = [("law", "v1", str(n), f"p{n}", q, o, same, "scope", str(n)) for n, (q, o, same) in enumerate(rows)]
    return pd.DataFrame(values, columns=LABELLED.names)


def scored(pairs, *similarities):
    return pairs.assign(similarity=similarities)[SCORES.names]


def page_of(wrong):
    nothing = Section("x")
    return Page("how", nothing, [], [Figure("f", "c", "<svg></svg>")], wrong, [], [], "a: <b>").html()


def test_the_worst_come_first_each_pair_once():
    pairs = labelled(("a", "b", True), ("a", "c", False), ("d", "e", False), ("f", "g", True))
    twice = pd.concat([pairs, pairs[:1].assign(test_id="9")])
    false_hits, misses = worst_pairs(
        scored(twice, 0.9, 0.2, 0.8, 0.1, 0.9), scored(twice, 0.5, 0.6, 0.7, 0.8, 0.5), twice, "joint"
    )
    columns = ["kind", "query", "the cache holds", "base", "joint"]
    assert false_hits.table[columns].to_numpy().tolist() == [
        ["scope", "d", "e", "0.700", "0.800"],
        ["scope", "a", "c", "0.600", "0.200"],
    ]
    assert misses.table[columns].to_numpy().tolist() == [
        ["paraphrase", "f", "g", "0.800", "0.100"],
        ["paraphrase", "a", "b", "0.500", "0.900"],
    ]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_query_is_shown_as_text(query):
    pairs = labelled((query, "other", False), ("a", "b", True))
    page = page_of(worst_pairs(scored(pairs, 0.9, 0.1), scored(pairs, 0.9, 0.1), pairs, "joint"))
    cells = re.findall(r'<td class="[a-z]*">(.*?)</td>', page, flags=re.DOTALL)
    assert on_one_line(query) in [html.unescape(cell) for cell in cells]
    # Nothing of it became an element.
    empty = page_of(
        worst_pairs(
            scored(pairs, 0.9, 0.1), scored(pairs, 0.9, 0.1), labelled(("q", "other", False), ("a", "b", True)), "joint"
        )
    )
    assert len(re.findall(r"<[a-z/]", page)) == len(re.findall(r"<[a-z/]", empty))


def test_the_configuration_and_the_drawings_are_on_the_page():
    page = page_of([])
    assert "a: &lt;b&gt;" in page
    assert "<svg></svg>" in page


def test_domains_with_other_steps_stand_side_by_side():
    table = funnel_section({"law": [["queries", 3], ["kept", 2]], "own": [["queries", 5]]}).table
    assert table.to_numpy().tolist() == [["queries", "3", "5"], ["kept", "2", ""]]


def test_times_are_added_up_by_stage_and_gpus_counted_where_they_computed():
    manifests = [
        {"config": {"device": {"type": "cuda", "processes": 2, "seconds": 10.0}}},
        {"config": {"device": {"type": "cpu", "processes": 1, "seconds": 99.0}}},
        {"config": {}},
    ]
    timings = [("train", 12.0, 20.0), ("train", 100.0, 150.0), ("evaluate", 5.0, 6.0)]
    assert time_section(timings, manifests).table.to_numpy().tolist() == [
        ["train", "2", "112", "170", "20"],
        ["evaluate", "1", "5", "6", ""],
    ]


def test_the_origin_names_commit_versions_and_machines():
    machine = {"system": "Linux x86_64", "processor": "P", "cpus": 2, "gpus": []}
    manifest = {"versions": {"torch": "2.13.0"}, "hardware": machine | {"gpus": ["G"]}}
    rows = dict(origin_section(manifest, {"hardware": machine}).table.to_numpy().tolist())
    assert rows["version of torch"] == "2.13.0"
    assert rows["trained on"] == "Linux x86_64, P, 2 CPUs, G"
    assert rows["measured on"] == "Linux x86_64, P, 2 CPUs, no GPU"
    assert rows["commit"]
