"""The choice of a sweep, from results made by hand."""

import json

import pytest
import yaml

from cachelora.sweep import chosen_settings, sweep_report, sweep_table


def result(ap, margin, similarity=0.7, seconds=10.0):
    def row(step, ap, margin, similarity):
        values = {"ap": ap, "p_chr_auc": ap, "margin": margin, "accuracy": 0.5, "positive_similarity": similarity}
        return {"step": step, **values, "domains": {"law": values | {"ap": ap + 0.1}, "general": values}}

    rows = [row(0, 0.5, 0.0, 0.7), row(4, ap, margin, similarity), row(8, 0.1, 0.0, 0.7)]
    return {"best_step": 4, "validation": rows, "device": {"seconds": seconds}}


TRIALS = {
    "sweep-001": {"rank": 4, "losses": {"ranking": 1.0}},
    "sweep-002": {"rank": 4, "losses": {"ranking": 1.0}},
    "sweep-003": {"rank": 8, "losses": {"ranking": 1.0}},
    "sweep-004": {"rank": 8, "losses": {"ranking": 1.0}},
}


def ranks(table):
    return [json.loads(changed)["rank"] for changed in table["changed"]]


def test_seeds_are_averaged_and_the_best_mean_comes_first():
    results = dict(zip(TRIALS, [result(0.9, 0.1), result(0.5, 0.1), result(0.8, 0.1), result(0.7, 0.3)], strict=True))
    table = sweep_table(TRIALS, results, 0.05)
    assert ranks(table) == [8, 4]
    assert table.loc[0, ["ap", "margin", "ap law", "seeds", "seconds"]].tolist() == pytest.approx(
        [0.75, 0.2, 0.85, 2, 10]
    )
    chosen = chosen_settings(table, {"losses": {"ranking": 1.0, "bce": 0.5}})
    assert chosen == {"train": {"rank": 8, "losses": {"ranking": 1.0, "bce": None}}}
    assert yaml.safe_load(yaml.safe_dump(chosen)) == chosen
    assert '| {"rank": 8, "losses": {"ranking": 1.0}} |' in sweep_report(table, "minilm-l6").splitlines()[6]


def test_what_loses_too_much_positive_similarity_comes_last_and_margin_breaks_ties():
    names = list(TRIALS)[::2]
    trials = {name: TRIALS[name] for name in names}
    lossy = dict(zip(names, [result(0.9, 0.1, similarity=0.6), result(0.6, 0.1)], strict=True))
    assert ranks(sweep_table(trials, lossy, 0.05)) == [8, 4]
    assert ranks(sweep_table(trials, lossy, 0.2)) == [4, 8]
    tie = dict(zip(names, [result(0.6, 0.2), result(0.6, 0.1)], strict=True))
    assert ranks(sweep_table(trials, tie, 0.05)) == [4, 8]
