"""The corpora that ship: their form and their counts. What they mean was judged by readers (data/README.md)."""

import json
from collections import Counter

import pytest
from conftest import ROOT

from cachelora.augment.reply import RawReply, check_reply
from cachelora.schemas import KINDS
from cachelora.testset import read_testset
from cachelora.text import trivial_key

DOMAINS = ("medical", "law", "programming", "psychology")


def read(path):
    return [json.loads(line) for line in (ROOT / "data" / path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_query_has_one_complete_recording(domain):
    queries, recorded = read(f"{domain}/queries.jsonl"), read(f"{domain}/augmented.jsonl")
    assert [row["query"] for row in queries] == [row["query"] for row in recorded]
    assert len({trivial_key(row["query"]) for row in queries}) == len(queries) == 180
    assert len({row["subfield"] for row in queries}) >= 25
    for row in recorded:
        reply = check_reply(RawReply("id", row, row["model"], row["prompt_version"]), row["query"], 400)
        assert not reply.refused, row["query"]
        assert reply.complete(3, 3), row["query"]
        assert len({negative["kind"] for negative in row["negatives"]}) >= 3, row["query"]


@pytest.mark.parametrize("domain", [*DOMAINS, "general"])
def test_test_sets_have_every_kind_and_both_verdicts_for_every_triplet(domain):
    table, rejects = read_testset(ROOT / f"data/{domain}/test.jsonl", 0.0)
    assert not rejects
    least = 26 if domain == "general" else 41
    assert Counter(table["kind"]) == dict.fromkeys(KINDS, least)
    verdicts = {(row["anchor"], row[role]): row["same_answer"] for row in read(f"{domain}/test.review.jsonl")
                for role in ("positive", "negative") if role in row}  # fmt: skip
    for row in table.itertuples():
        assert verdicts[row.anchor, row.positive], row.anchor
        assert not verdicts[row.anchor, row.negative], row.anchor
