"""Stage `thresholds`: the lowest threshold that keeps false hits within a budget, and what it leaves of the hits.

It is chosen on the calibration part of the test sets and tried on the test part, which shares no text with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import beta

from cachelora.config import Thresholds
from cachelora.schemas import THRESHOLDS

ALL_DOMAINS = "all domains"
OWN, ALL, FIXED = "own", "all", "fixed"
REFIT_HEAD = ("budget", "threshold", "false hits", "false-hit rate at most", "recall", "hit ratio")
_LEFT = ("recall", "hit_ratio")
_DECIMALS = 4
"""Thresholds are rounded up to so many."""
_SLACK = 1e-5
"""A pair that is to miss lies so far below: libraries differ by less in the cosine of the same two texts."""


@dataclass(frozen=True)
class Threshold:
    """A threshold that was chosen for a false-hit budget.

    Attributes
    ----------
    value : float or None
        Cosine at and above which a pair hits; None if no threshold can be shown to keep to the budget.
    negatives : int
        Pairs with another answer that it was chosen on.
    effective : float
        So many independent pairs they are worth.
    false_hits : int
        How many of them hit.
    upper : float or None
        With the confidence asked for, the false-hit rate is no higher than that.
    """

    value: float | None
    negatives: int
    effective: float
    false_hits: int
    upper: float | None


def effective_number(groups: Sequence[str]) -> float:
    """Return how many independent pairs grouped ones are worth at least.

    Pairs of one group may all hit or all miss together. Then n pairs are worth (sum of n_g)^2 / sum of n_g^2, n_g being
    the sizes of the groups (Kish 1965, "Survey Sampling", section 11.7); with less in common they are worth more.

    Parameters
    ----------
    groups : sequence of str, length n
        Group of each pair.

    Returns
    -------
    float
        Between 1 and n; 0 without pairs.
    """
    _, sizes = np.unique(np.asarray(groups), return_counts=True)
    return float(sizes.sum() ** 2 / np.square(sizes).sum()) if len(sizes) else 0.0


def upper_bound(share: float, effective: float, confidence: float) -> float:
    """Return the one-sided upper bound of a share (Clopper & Pearson 1934).

    Parameters
    ----------
    share : float
        The share that was found, in [0, 1].
    effective : float
        Number of independent cases behind it.
    confidence : float
        Coverage, in (0, 1).

    Returns
    -------
    float
        The true share is no higher, with that confidence.
    """
    if share >= 1 or effective <= 0:
        return 1.0
    return float(beta.ppf(confidence, share * effective + 1, effective * (1 - share)))


def share_interval(happened: np.ndarray, groups: Sequence[str], confidence: float) -> tuple[float, float, float]:
    """Return a share with its two-sided interval (Clopper & Pearson 1934, on the effective number of cases).

    Parameters
    ----------
    happened : numpy.ndarray, shape (n,), bool
        Whether it was so in each case.
    groups : sequence of str, length n
        Group of each case.
    confidence : float
        Coverage, in (0, 1).

    Returns
    -------
    share, low, high : float
        Not numbers without cases.
    """
    if not len(happened):
        return (math.nan,) * 3
    share, effective, each_side = float(np.mean(happened)), effective_number(groups), (1 + confidence) / 2
    return share, 1 - upper_bound(1 - share, effective, each_side), upper_bound(share, effective, each_side)


def fit_threshold(similarity: np.ndarray, groups: Sequence[str], budget: float, confidence: float) -> Threshold:
    """Choose the lowest threshold whose false-hit rate is within a budget.

    The rate falls as the threshold rises, so going down from the highest threshold until the first whose upper bound
    is above the budget keeps the confidence, however many thresholds are tried (fixed-sequence testing: Angelopoulos
    et al. 2021, "Learn then Test", arXiv:2110.01052, section 3; Bates et al. 2021, arXiv:2101.02703, theorem 1).

    Parameters
    ----------
    similarity : numpy.ndarray, shape (n,)
        Cosines of the pairs with another answer.
    groups : sequence of str, length n
        Their groups.
    budget : float
        Largest share of pairs with another answer that may hit, in (0, 1).
    confidence : float
        Coverage, in (0, 1).

    Returns
    -------
    Threshold
        The threshold, rounded up to four decimals.
    """
    falling = np.sort(np.asarray(similarity, dtype=np.float64))[::-1]
    effective, allowed = effective_number(groups), None
    for false_hits in range(len(falling) + 1):
        upper = upper_bound(false_hits / max(1, len(falling)), effective, confidence)
        if upper > budget:
            break
        allowed = false_hits, upper
    none = Threshold(None, len(falling), effective, 0, None)
    if allowed is None:
        return none
    # The next negative below must not hit.
    value = _above(falling[allowed[0]]) if allowed[0] < len(falling) else -1.0
    if value > 1:
        return none
    # Negatives with equal cosines miss together.
    false_hits = int((falling >= value).sum())
    return Threshold(
        value, len(falling), effective, false_hits, upper_bound(false_hits / len(falling), effective, confidence)
    )


def _above(similarity: float) -> float:
    """Return the lowest threshold of so many decimals at which a pair of that similarity misses."""
    steps = 10**_DECIMALS
    return (math.floor((similarity + _SLACK) * steps) + 1) / steps


def negatives_needed(budget: float, confidence: float) -> int:
    """Return how many pairs with another answer a budget takes, if none of them hits.

    Parameters
    ----------
    budget, confidence : float
        As for :func:`fit_threshold`.

    Returns
    -------
    int
        The least number of independent ones.
    """
    return math.ceil(math.log(1 - confidence) / math.log(1 - budget))


def at_threshold(
    similarity: np.ndarray, same_answer: np.ndarray, groups: Sequence[str], threshold: float, confidence: float
) -> dict[str, float]:
    """Say what a threshold does to labelled pairs.

    Parameters
    ----------
    similarity : numpy.ndarray, shape (n,)
        Their cosines.
    same_answer : numpy.ndarray, shape (n,), bool
        Whether one answer serves both texts.
    groups : sequence of str, length n
        Their groups.
    threshold : float
        Cosine at and above which a pair hits.
    confidence : float
        Coverage of the intervals, in (0, 1).

    Returns
    -------
    dict of str to float
        recall (share of the pairs with the same answer that hit), false_hit_rate (of those with another), hit_ratio (of
        all) and precision (share of the hits with the same answer), each with ``_low`` and ``_high``.
    """
    hit, groups = np.asarray(similarity) >= threshold, np.asarray(groups)
    same_answer = np.asarray(same_answer, dtype=bool)
    parts = {
        "recall": (hit, same_answer),
        "false_hit_rate": (hit, ~same_answer),
        "hit_ratio": (hit, np.ones(len(hit), dtype=bool)),
        "precision": (same_answer, hit),
    }
    found = {}
    for name, (happened, among) in parts.items():
        share = share_interval(happened[among], groups[among], confidence)
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), share, strict=True))
    return found


def thresholds_table(scores: pd.DataFrame, parts: Mapping[str, pd.DataFrame], settings: Thresholds) -> pd.DataFrame:
    """Choose the thresholds of a model, by domain and for all domains, and try them.

    Parameters
    ----------
    scores : pandas.DataFrame
        Scores of the model on the domains' test sets, in the columns of :data:`cachelora.schemas.SCORES`.
    parts : mapping of str to pandas.DataFrame
        By domain, its labelled pairs in the columns of :data:`cachelora.schemas.PAIRS`, which say the part of each
        group.
    settings : Thresholds
        Budgets, confidence, the fixed threshold.

    Returns
    -------
    pandas.DataFrame
        In the columns of :data:`cachelora.schemas.THRESHOLDS`.
    """
    part_of = {
        (domain, row.group): row.part
        for domain, pairs in parts.items()
        for row in pairs[["group", "part"]].drop_duplicates().itertuples()
    }
    scores = scores[scores["test_set"].isin([*parts])].drop_duplicates(["test_set", "pair_id"])
    part = np.array([part_of[key] for key in zip(scores["test_set"], scores["group"], strict=True)])
    # A group of another domain is another group, whatever it is called.
    scores = scores.assign(group=scores["test_set"] + " " + scores["group"])
    calibration, test = scores[part == "calibration"], scores[part == "test"]
    rows = []
    common = [(ALL, budget, _fit(calibration, budget, settings)) for budget in settings.budgets]
    fixed = [(FIXED, math.nan, Threshold(settings.fixed, 0, 0.0, 0, None))]
    for test_set in (*parts, ALL_DOMAINS):
        mine = test if test_set == ALL_DOMAINS else test[test["test_set"] == test_set]
        own = []
        if test_set != ALL_DOMAINS:
            chosen_on = calibration[calibration["test_set"] == test_set]
            own = [(OWN, budget, _fit(chosen_on, budget, settings)) for budget in settings.budgets]
        for fitted_on, budget, threshold in (*own, *common, *fixed):
            rows.append(
                {"test_set": test_set, "fitted_on": fitted_on, "budget": budget} | _row(mine, threshold, settings)
            )
    table = pd.DataFrame(rows)
    return table.astype({name: "float64" for name in ("threshold", "upper")})[THRESHOLDS.names]


def _fit(calibration: pd.DataFrame, budget: float, settings: Thresholds) -> Threshold:
    """Choose a threshold on the calibration part."""
    negatives = calibration[~calibration["same_answer"]]
    return fit_threshold(negatives["similarity"].to_numpy(), negatives["group"], budget, settings.confidence)


def _row(test: pd.DataFrame, threshold: Threshold, settings: Thresholds) -> dict[str, float | int | None]:
    """Say what a threshold was chosen on, and what it does to the test part."""
    # A budget that no threshold keeps leaves an empty cache: nothing hits.
    value = math.inf if threshold.value is None else threshold.value
    return {
        "threshold": threshold.value,
        "calibration_negatives": threshold.negatives,
        "calibration_effective": threshold.effective,
        "calibration_false_hits": threshold.false_hits,
        "upper": threshold.upper,
        "positives": int(test["same_answer"].sum()),
        "negatives": int((~test["same_answer"]).sum()),
    } | at_threshold(
        test["similarity"].to_numpy(), test["same_answer"].to_numpy(), test["group"], value, settings.confidence
    )


def refit_rows(scores: pd.DataFrame, settings: Thresholds) -> list[list[str]]:
    """Choose thresholds on labelled pairs of anybody's making.

    Parameters
    ----------
    scores : pandas.DataFrame
        Scores of a model on them, in the columns of :data:`cachelora.schemas.SCORES`.
    settings : Thresholds
        Budgets, confidence.

    Returns
    -------
    list of list of str
        A row for each budget, under :data:`REFIT_HEAD`. Recall and hit ratio are those of the same pairs.
    """
    scores = scores.drop_duplicates("pair_id")
    rows = []
    for budget in settings.budgets:
        found = _fit(scores, budget, settings)
        if found.value is None:
            needed = negatives_needed(budget, settings.confidence)
            why = f"none: it takes {needed} independent pairs with another answer, none of which hits"
            rows.append([f"{budget:.2%}", f"{why}; these are worth {found.effective:.0f}", "", "", "", ""])
            continue
        row = _row(scores, found, settings)
        shown = (f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for name in _LEFT)
        false_hits = f"{found.false_hits} of {found.negatives}"
        rows.append([f"{budget:.2%}", f"{found.value:.4f}", false_hits, f"{found.upper:.4f}", *shown])
    return rows


@dataclass(frozen=True)
class Drift:
    """What new labelled pairs say of a threshold that was chosen earlier.

    Attributes
    ----------
    rate, low, high : float
        False-hit rate and its interval.
    verdict : str
        What :func:`verdict_on` says.
    """

    rate: float
    low: float
    high: float
    verdict: str


def drift(scores: pd.DataFrame, threshold: float, budget: float, confidence: float) -> Drift:
    """Say whether a threshold still keeps to its budget.

    Parameters
    ----------
    scores : pandas.DataFrame
        Scores of the model on new labelled pairs, in the columns of :data:`cachelora.schemas.SCORES`.
    threshold : float
        Cosine at and above which a pair hits.
    budget : float
        Largest share of pairs with another answer that may hit, in (0, 1).
    confidence : float
        Coverage of the interval, in (0, 1).

    Returns
    -------
    Drift
        The verdict.
    """
    scores = scores.drop_duplicates("pair_id")
    found = at_threshold(scores["similarity"], scores["same_answer"], scores["group"], threshold, confidence)
    rate, low, high = (found[f"false_hit_rate{end}"] for end in ("", "_low", "_high"))
    return Drift(rate, low, high, verdict_on(low, high, budget))


def verdict_on(low: float, high: float, budget: float) -> str:
    """Say whether a false-hit rate is within a budget.

    Parameters
    ----------
    low, high : float
        The interval of the rate.
    budget : float
        Largest share of pairs with another answer that may hit.

    Returns
    -------
    str
        ``broken`` if the whole interval lies above the budget, ``kept`` if it lies within, ``undecided`` between.
    """
    return "broken" if low > budget else "kept" if high <= budget else "undecided"
