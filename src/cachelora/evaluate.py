"""Stage `evaluate`: one model on all test sets, with intervals, beside the base model."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from cachelora.config import Evaluate
from cachelora.errors import ModelError
from cachelora.metrics import BIASED, Counts, distributions, interval, pairs_of, registry
from cachelora.schemas import CURVES, KINDS, LABELLED, LOOK_ALIKE_KINDS
from cachelora.text import digest

ALL_KINDS = "all"
LOOK_ALIKES = "look-alike"
MIN_GROUPS = 10
"""Fewer groups give no interval: resampling a handful says how they differ, not how others would."""
GRID = np.round(np.arange(0.4, 1.001, 0.01), 2)
"""Thresholds of the curves, cosines."""


def join_testsets(testsets: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Put the triplets of all domains into one table of labelled pairs, so that what they share is encoded once.

    Parameters
    ----------
    testsets : mapping of str to pandas.DataFrame
        By domain, in the columns of :data:`cachelora.schemas.TESTSET`.

    Returns
    -------
    pandas.DataFrame
        Two rows for each triplet, in the columns of :data:`cachelora.schemas.LABELLED`.
    """
    rows = [
        (domain, row.test_version, row.test_id, digest(f"{row.anchor}\n{other}"), row.anchor, other, same, row.kind,
         row.group)
        for domain, table in testsets.items()
        for row in table.itertuples()
        for other, same in ((row.positive, True), (row.negative, False))
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=LABELLED.names)


def measure(
    scores: pd.DataFrame, base_scores: pd.DataFrame, settings: Evaluate, seed: int, threads: int = 1
) -> list[dict[str, Any]]:
    """Compute every metric by test set and kind, with its interval and its change from the base model.

    Parameters
    ----------
    scores : pandas.DataFrame
        Scores of the model, in the columns of :data:`cachelora.schemas.SCORES`.
    base_scores : pandas.DataFrame
        Scores of the base model on the same pairs in the same order; ``scores`` itself for the base model.
    settings : Evaluate
        Number of resamples, coverage, false-hit budget.
    seed : int
        Seed of the bootstrap.
    threads : int
        Threads that compute.

    Returns
    -------
    list of dict
        For each test set, kind (``all`` and ``look-alike`` first) and metric: test_set, test_version, kind, metric, n
        (triplets, or pairs), groups, value, low, high, change, change_low, change_high, p (two-sided, that the change
        is 0: a normal distribution with the bootstrap's standard error, Efron & Tibshirani 1993, chapter 12), and
        relative_change with its interval where the base model's margin lies above zero with its whole interval (None
        elsewhere). Intervals and p are None where there are fewer than :data:`MIN_GROUPS` groups. Changes are paired:
        one bootstrap draw serves both models. A metric that a set does not have (accuracy of pairs) has no row.

    Raises
    ------
    ValueError
        If the two tables are not about the same pairs.
    ModelError
        If a similarity is not a number.
    """
    about = ["test_set", "test_id", "pair_id"]
    if not (scores[about].to_numpy() == base_scores[about].to_numpy()).all():
        raise ValueError("scores and base_scores are not about the same pairs")
    if not np.isfinite(scores["similarity"].to_numpy()).all():
        raise ModelError("the model", "its embeddings are not all numbers", "Train it again with a lower learning rate")
    results = []
    for test_set in scores["test_set"].unique():
        members = {ALL_KINDS: (*KINDS, ""), LOOK_ALIKES: LOOK_ALIKE_KINDS}
        for kind in (*members, *KINDS):
            chosen = (scores["test_set"] == test_set) & scores["kind"].isin(members.get(kind, [kind]))
            if chosen.any():
                version = scores["test_version"][chosen].iloc[0]
                place = {"test_set": test_set, "test_version": version, "kind": kind}
                rows = _measure_set(scores[chosen], base_scores[chosen], settings, seed, threads)
                results += [place | row for row in rows]
    return results


def _measure_set(
    scores: pd.DataFrame, base_scores: pd.DataFrame, settings: Evaluate, seed: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Compute every metric on one set of pairs."""
    groups = scores["group"].nunique()
    resamples = settings.bootstrap if groups >= MIN_GROUPS else 0
    metrics = registry(settings.false_hit_budget)

    def drawn(table: pd.DataFrame) -> dict[str, np.ndarray]:
        pairs = pairs_of(table["similarity"], table["same_answer"], table["group"], table["test_id"])
        return distributions(pairs, metrics, resamples, seed, threads)

    model = drawn(scores)
    # The base model itself need not be drawn twice.
    same = scores["similarity"].equals(base_scores["similarity"])
    base = model if same else drawn(base_scores)
    for name in metrics:
        # The first value is the metric itself, the others are its bootstrap distribution.
        values, base_values = model[name], base[name]
        if not np.isfinite(values[0]):
            continue
        changes = values - base_values
        row = {"metric": name, "n": scores["test_id"].nunique(), "groups": groups}
        row |= _with_interval("", values, settings, corrected=name in BIASED)
        row |= _with_interval("change", changes, settings)
        row["p"] = _p_value(changes) if resamples and changes.any() else None
        row |= dict.fromkeys(("relative_change", "relative_change_low", "relative_change_high"))
        # A share of a margin near zero says nothing, and below zero it has the wrong sign.
        if name == "margin" and resamples and interval(base_values, settings.confidence)[0] > 0:
            row |= _with_interval("relative_change", values / base_values - 1, settings)
        yield row


def _with_interval(
    name: str, values: np.ndarray, settings: Evaluate, corrected: bool = False
) -> dict[str, float | None]:
    """Name a value and its interval; the value is the first, its bootstrap distribution the rest."""
    low, high = interval(values, settings.confidence, corrected) if len(values) > 1 else (None, None)
    prefix = f"{name}_" if name else ""
    return {name or "value": float(values[0]), f"{prefix}low": low, f"{prefix}high": high}


def _p_value(changes: np.ndarray) -> float:
    """Return the probability of so large a change, or a larger one, where there is none."""
    error = np.nanstd(changes[1:], ddof=1)
    return math.erfc(abs(changes[0]) / error / math.sqrt(2)) if error > 0 else 0.0


def curves(scores: pd.DataFrame, settings: Evaluate, seed: int) -> pd.DataFrame:
    """Compute what a cache does at each threshold of a grid.

    Parameters
    ----------
    scores : pandas.DataFrame
        In the columns of :data:`cachelora.schemas.SCORES`.
    settings : Evaluate
        Number of resamples, coverage.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        In the columns of :data:`cachelora.schemas.CURVES`.
    """

    def at_grid(counts: Counts) -> np.ndarray:
        hits, false_hits = counts.at(GRID)
        made, positives, negatives = hits + false_hits, counts.positives[:, None], counts.negatives[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = hits / made, hits / positives, false_hits / negatives, made / (positives + negatives)
        return np.stack(shares, axis=1)

    names = ("precision", "recall", "false_hit_rate", "hit_ratio")
    rows = []
    for test_set, table in scores.groupby("test_set", sort=False):
        pairs = pairs_of(table["similarity"], table["same_answer"], table["group"])
        resamples = settings.bootstrap if pairs.groups >= MIN_GROUPS else 0
        values = distributions(pairs, {"grid": at_grid}, resamples, seed)["grid"]
        for number, name in enumerate(names):
            for place, threshold in enumerate(GRID):
                drawn = values[:, number, place]
                known = np.isfinite(drawn[1:]).any()
                low, high = interval(drawn, settings.confidence) if known else (np.nan, np.nan)
                rows.append((test_set, threshold, name, values[0, number, place], low, high))
    return pd.DataFrame(rows, columns=CURVES.names)
