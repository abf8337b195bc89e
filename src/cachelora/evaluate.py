"""Stage `evaluate`: one model on all test sets, with intervals, beside the base model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from cachelora.config import Evaluate
from cachelora.errors import ModelError
from cachelora.metrics import bootstrap_weights, interval, registry
from cachelora.schemas import KINDS, LOOK_ALIKE_KINDS

ALL_KINDS = "all"
LOOK_ALIKES = "look-alike"
MIN_GROUPS = 10
"""Fewer groups give no interval: resampling a handful says how they differ, not how others would."""


def join_testsets(testsets: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Put all test sets into one table, so that what they share is encoded once.

    Parameters
    ----------
    testsets : mapping of str to pandas.DataFrame
        By domain, in the columns of :data:`cachelora.schemas.TESTSET`.

    Returns
    -------
    pandas.DataFrame
        Their rows, with the domain as test_set; with similarities it has the columns of
        :data:`cachelora.schemas.SCORES`.
    """
    return pd.concat([table.assign(test_set=domain) for domain, table in testsets.items()], ignore_index=True)


def measure(scores: pd.DataFrame, base_scores: pd.DataFrame, settings: Evaluate, seed: int) -> list[dict[str, Any]]:
    """Compute every metric by test set and kind, with its interval and its change from the base model.

    Parameters
    ----------
    scores : pandas.DataFrame
        Scores of the model, in the columns of :data:`cachelora.schemas.SCORES`.
    base_scores : pandas.DataFrame
        Scores of the base model on the same triplets in the same order; ``scores`` itself for the base model.
    settings : Evaluate
        Number of resamples, coverage, false-hit budget.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    list of dict
        For each test set, kind (``all`` and ``look-alike`` first) and metric: test_set, test_version, kind, metric, n
        (triplets), groups, value, low, high, change, change_low, change_high, and relative_change with its interval
        where the base model's margin lies above zero with its whole interval (None elsewhere). Intervals are None
        where there are fewer than :data:`MIN_GROUPS` groups. Changes are paired: one bootstrap draw serves both models.

    Raises
    ------
    ValueError
        If the two tables are not about the same triplets.
    ModelError
        If a similarity is not a number.
    """
    if not (scores[["test_set", "test_id"]].to_numpy() == base_scores[["test_set", "test_id"]].to_numpy()).all():
        raise ValueError("scores and base_scores are not about the same triplets")
    if not np.isfinite(scores[["positive_similarity", "negative_similarity"]].to_numpy()).all():
        raise ModelError("the model", "its embeddings are not all numbers", "Train it again with a lower learning rate")
    results = []
    for test_set in scores["test_set"].unique():
        members = {ALL_KINDS: KINDS, LOOK_ALIKES: LOOK_ALIKE_KINDS}
        for kind in (*members, *KINDS):
            chosen = (scores["test_set"] == test_set) & scores["kind"].isin(members.get(kind, [kind]))
            if chosen.any():
                version = scores["test_version"][chosen].iloc[0]
                place = {"test_set": test_set, "test_version": version, "kind": kind}
                results += [place | row for row in _measure_set(scores[chosen], base_scores[chosen], settings, seed)]
    return results


def _measure_set(
    scores: pd.DataFrame, base_scores: pd.DataFrame, settings: Evaluate, seed: int
) -> list[dict[str, Any]]:
    """Compute every metric on one set of triplets."""
    once = np.ones((1, len(scores)))
    groups = scores["group"].nunique()
    resamples = bootstrap_weights(scores["group"], settings.bootstrap, seed) if groups >= MIN_GROUPS else once[:0]
    weights = np.concatenate([once, resamples])
    model, base = (
        (table["positive_similarity"].to_numpy(), table["negative_similarity"].to_numpy())
        for table in (scores, base_scores)
    )
    rows = []
    for name, metric in registry(settings.false_hit_budget).items():
        # The first value is the metric itself, the others are its bootstrap distribution.
        values, base_values = metric(*model, weights), metric(*base, weights)
        row = {"metric": name, "n": len(scores), "groups": groups}
        row |= _with_interval("", values, settings)
        row |= _with_interval("change", values - base_values, settings)
        row |= dict.fromkeys(("relative_change", "relative_change_low", "relative_change_high"))
        # A share of a margin near zero says nothing, and below zero it has the wrong sign.
        if name == "margin" and groups >= MIN_GROUPS and interval(base_values[1:], settings.confidence)[0] > 0:
            row |= _with_interval("relative_change", values / base_values - 1, settings)
        rows.append(row)
    return rows


def _with_interval(name: str, values: np.ndarray, settings: Evaluate) -> dict[str, float | None]:
    """Name a value and its interval; the value is the first, its bootstrap distribution the rest."""
    low, high = interval(values[1:], settings.confidence) if len(values) > 1 else (None, None)
    prefix = f"{name}_" if name else ""
    return {name or "value": float(values[0]), f"{prefix}low": low, f"{prefix}high": high}
