"""Thresholds for a false-hit budget: chosen, tried, refused and checked for drift."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from cachelora.cli import main
from cachelora.config import Thresholds
from cachelora.errors import ModelError
from cachelora.files import read_table, write_table
from cachelora.models import load_model, score_pairs
from cachelora.schemas import PAIRS, SCORES, THRESHOLDS
from cachelora.thresholds import (
    ALL,
    ALL_DOMAINS,
    FIXED,
    OWN,
    at_threshold,
    drift,
    effective_number,
    fit_threshold,
    negatives_needed,
    share_interval,
    thresholds_table,
    upper_bound,
    verdict_on,
)  # fmt: skip


@given(st.integers(1, 400), st.data())
def test_the_bound_is_that_of_the_binomial_test(n, data):
    hits = data.draw(st.integers(0, n - 1))
    # At the bound, so few hits have a probability of 5 %.
    assert binom.cdf(hits, n, upper_bound(hits / n, n, 0.95)) == pytest.approx(0.05, abs=1e-6)


def test_bounds_where_all_or_nothing_hits():
    assert upper_bound(1.0, 50, 0.95) == 1
    assert upper_bound(0.0, 0, 0.95) == 1
    assert upper_bound(0.0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert all(math.isnan(value) for value in share_interval(np.zeros(0, dtype=bool), [], 0.95))
    assert share_interval(np.array([True, True]), ["a", "b"], 0.95)[2] == 1


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05])
def test_how_many_negatives_a_budget_takes(budget):
    needed = negatives_needed(budget, 0.95)
    assert upper_bound(0, needed, 0.95) <= budget < upper_bound(0, needed - 1, 0.95)
    assert fit_threshold(np.linspace(0, 0.9, needed), range(needed), budget, 0.95).value is not None
    assert fit_threshold(np.linspace(0, 0.9, needed - 1), range(needed - 1), budget, 0.95).value is None


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40))
def test_effective_number_is_between_one_and_the_number_of_groups(groups):
    found = effective_number(groups)
    assert found == 0 if not groups else 1 <= found + 1e-9 <= len(set(groups)) + 2e-9


@given(st.lists(st.integers(-100, 100), min_size=59, max_size=150), st.sampled_from([0.05, 0.1, 0.3]))
def test_it_is_the_lowest_threshold_that_keeps_the_budget(values, budget):
    similarity = np.array(values) / 100
    n = len(similarity)
    found = fit_threshold(similarity, range(n), budget, 0.95)

    def bound(threshold):
        return upper_bound(np.mean(similarity >= threshold), n, 0.95)

    if found.value is None:
        # Even above the highest cosine there is no threshold of four digits up to 1.
        assert bound(1) > budget
        return
    assert found.false_hits == (similarity >= found.value).sum()
    assert bound(found.value) == pytest.approx(found.upper) and found.upper <= budget
    # One step lower, the next negative hits.
    assert found.value == -1 or bound(found.value - 2e-4) > budget


def test_negatives_that_hang_together_are_worth_less():
    similarity = np.linspace(0, 0.9, 120)
    apart, together = (fit_threshold(similarity, groups, 0.05, 0.95) for groups in (range(120), np.arange(120) // 2))
    assert together.effective == 60 < apart.effective == 120
    assert together.value > apart.value


def test_a_chosen_threshold_breaks_its_budget_in_no_more_than_one_of_twenty_draws():
    random = np.random.default_rng(3)
    # In pairs that hit together or not at all, the worst case; the true rate above t is 1 - t.
    broken = sum(
        1 - found.value > 0.05
        for _ in range(1000)
        if (found := fit_threshold(np.repeat(random.random(100), 2), np.arange(200) // 2, 0.05, 0.95)).value is not None
    )
    # 50 allowed; three standard deviations of a binomial draw above it.
    assert broken <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95)


def test_what_a_threshold_does_by_hand():
    found = at_threshold(
        np.array([0.9, 0.8, 0.4, 0.85, 0.3]), np.array([True, True, True, False, False]), range(5), 0.8, 0.95
    )
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["false_hit_rate"] == 0.5
    assert found["hit_ratio"] == pytest.approx(3 / 5)
    assert found["precision"] == pytest.approx(2 / 3)
    assert all(found[f"{name}_low"] < found[name] < found[f"{name}_high"] for name in ("recall", "hit_ratio"))


def made_up(domains=("law", "medical"), groups=200, seed=0):
    """Scores of triplets of several domains, and the parts of their groups."""
    random = np.random.default_rng(seed)
    scores, parts = [], {}
    for domain in domains:
        rows = []
        for group in range(groups):
            part = "calibration" if group % 2 else "test"
            for same, similarity in ((True, random.normal(0.8, 0.1)), (False, random.normal(0.5, 0.1))):
                pair = f"{domain} {group} {same}"
                # Groups of two domains may have the same name.
                scores.append((domain, "v1", str(group), pair, same, "aspect", f"g{group}", similarity))
                rows.append((pair, "a", "b", same, "aspect", f"g{group}", part))
        parts[domain] = pd.DataFrame(rows, columns=PAIRS.names)
    return pd.DataFrame(scores, columns=SCORES.names), parts


def test_thresholds_are_chosen_on_one_part_and_tried_on_the_other(tmp_path):
    scores, parts = made_up()
    table = thresholds_table(scores, parts, Thresholds())
    assert list(table["test_set"].unique()) == ["law", "medical", ALL_DOMAINS]
    own = table[(table["test_set"] == "law") & (table["fitted_on"] == OWN)]
    assert own["calibration_negatives"].unique().tolist() == [100]
    # 100 negatives can show 5 %, not 1 or 2 %: then nothing hits.
    assert own["threshold"].notna().tolist() == [False, False, True]
    assert own["recall"].tolist()[:2] == [0, 0]
    everywhere = table[table["test_set"] == ALL_DOMAINS]
    assert everywhere["fitted_on"].tolist() == [ALL, ALL, ALL, FIXED]
    assert everywhere["calibration_negatives"].tolist() == [200, 200, 200, 0]
    # What is tried on the test part changes nothing in what was chosen.
    test = scores["group"].map(dict(zip(parts["law"]["group"], parts["law"]["part"], strict=True))) == "test"
    worse = thresholds_table(scores.assign(similarity=scores["similarity"].mask(test, 0.99)), parts, Thresholds())
    pd.testing.assert_series_equal(worse["threshold"], table["threshold"])
    assert (worse[worse["threshold"].notna()]["false_hit_rate"] == 1).all()
    # Extra test sets have no parts and take none.
    more = pd.concat([scores, scores[:4].assign(test_set="elsewhere")])
    pd.testing.assert_frame_equal(thresholds_table(more, parts, Thresholds()), table)
    write_table(tmp_path / "t.parquet", table, THRESHOLDS)
    assert len(read_table(tmp_path / "t.parquet", THRESHOLDS)) == len(table)


def test_drift_is_seen_when_it_is_sure():
    scores, _ = made_up(("law",), 400)
    assert drift(scores, 0.75, 0.05, 0.95).verdict == "kept"
    assert drift(scores, 0.5, 0.05, 0.95).verdict == "broken"
    assert drift(scores[:20], 0.62, 0.05, 0.95).verdict == "undecided"


def pairs_file(tmp_path, pairs=70):
    """Labelled pairs that any model tells apart."""
    rows = [{"a": f"how do i bake bread {n}", "b": f"how do i bake bread {n}?!", "label": 1} for n in range(pairs)]
    rows += [{"a": f"symptoms of illness {n}", "b": f"cheapest train to city {n}", "label": 0} for n in range(pairs)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_command_chooses_and_checks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = pairs_file(tmp_path)
    assert main(["threshold", path, "--budget", "0.05", "--budget", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "140 pairs, 70 of them with another answer" in out
    assert "0 of 70" in out
    assert "none: it takes 299 independent pairs with another answer, none of which hits; these are worth 70" in out
    assert main(["threshold", path, "--budget", "0.1", "--check", "0.8"]) == 0
    assert "kept" in capsys.readouterr().out
    assert main(["threshold", path, "--budget", "0.1", "--check", "-1"]) == 1
    assert "1.0000 [0.9487, 1.0000]   broken" in capsys.readouterr().out


def test_a_model_that_gives_no_numbers_keeps_to_no_budget(tmp_path, base):
    model = load_model(base, None)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(ModelError, match="its embeddings are not all numbers"):
        score_pairs(model, pd.DataFrame({"query": ["a"], "other": ["b"]}), 8)


def test_verdicts():
    assert verdict_on(0.06, 0.2, 0.05) == "broken"
    assert verdict_on(0.0, 0.05, 0.05) == "kept"
    assert verdict_on(0.0, 0.9, 0.05) == "undecided"


@pytest.mark.parametrize("bad", ["1", "0", "x"])
def test_the_command_refuses_a_budget_that_is_no_share(bad, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["threshold", str(tmp_path / "p.jsonl"), "--budget", bad])
    assert "--budget" in capsys.readouterr().err
