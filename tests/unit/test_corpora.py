"""The corpora that ship: their counts. Form, repetitions, leaks and verdicts are checked by `make data-check`."""

import json
from collections import Counter

import pytest
from conftest import ROOT

from cachelora.augment.reply import RawReply, check_reply
from cachelora.config import read_config
from cachelora.datacheck import positive_words
from cachelora.schemas import KINDS
from cachelora.testset import frozen_version, read_lock, read_testset

DOMAINS = ("medical", "law", "programming", "psychology")
CORPORA = (*DOMAINS, "general", "finance")
LEAST_QUERIES = {"general": 200, "finance": 60}
TRIPLETS_OF_A_KIND = {"general": 26, "finance": 16}


def read(path):
    return [json.loads(line) for line in (ROOT / "data" / path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("domain", CORPORA)
def test_every_query_has_one_complete_recording(domain):
    queries, recorded = read(f"{domain}/queries.jsonl"), read(f"{domain}/augmented.jsonl")
    assert [row["query"] for row in queries] == [row["query"] for row in recorded]
    assert len(queries) >= LEAST_QUERIES.get(domain, 400)
    assert len({row["subfield"] for row in queries}) >= 25
    for row in recorded:
        reply = check_reply(RawReply("id", row, row["model"], row["prompt_version"], "recorded"), row["query"], 400)
        assert not reply.refused, row["query"]
        assert 3 <= len(row["paraphrases"]) <= 4, row["query"]
        assert 4 <= len(row["negatives"]) <= 5, row["query"]
        assert len({negative["kind"] for negative in row["negatives"]}) >= 2, row["query"]


def test_the_corpora_are_as_large_as_the_data_card_says():
    card = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for domain in CORPORA:
        recorded = read(f"{domain}/augmented.jsonl")
        paraphrases = sum(len(row["paraphrases"]) for row in recorded)
        negatives = sum(len(row["negatives"]) for row in recorded)
        tests = len(read(f"{domain}/test.jsonl"))
        assert f"| {domain} | {len(recorded)} | {paraphrases} | {negatives} | {tests} |" in card


@pytest.mark.parametrize("domain", CORPORA)
def test_a_third_of_the_paraphrases_rename_the_subject(domain):
    verdicts = [row for row in read(f"{domain}/augmented.review.jsonl") if row["same_answer"]]
    assert sum(row["synonym"] for row in verdicts) >= len(verdicts) / 3


@pytest.mark.parametrize("domain", CORPORA)
def test_test_sets_have_every_kind_and_a_spread_of_difficulty(domain):
    table, rejects = read_testset(ROOT / f"data/{domain}/test.jsonl", 0.0, "x")
    assert not rejects
    assert Counter(table["kind"]) == dict.fromkeys(KINDS, TRIPLETS_OF_A_KIND.get(domain, 41))
    rows = read(f"{domain}/test.jsonl")
    assert len({row["subfield"] for row in rows}) >= 20
    assert sum(row["synonym"] for row in rows) >= len(rows) / 3
    kept = Counter(positive_words(row["anchor"], row["positive"]) for row in rows)
    assert all(kept[level] >= len(rows) / 4 for level in ("half", "few", "none"))


def test_every_test_set_that_ships_is_frozen_and_reviewed():
    config = read_config(ROOT / "config/domains.yaml", ROOT / "config/presets/fifth-domain.yaml")
    lock = read_lock(ROOT / config.testset.lock)
    assert {domain.test for domain in config.domains.values()} == set(lock)
    for path, frozen in lock.items():
        assert frozen_version(ROOT / path, frozen) == f"v{frozen.version}"
        assert (ROOT / path).with_suffix(".review.jsonl").is_file()
