"""What a cache gets from a model: metrics of labelled pairs, and their bootstrap distributions.

A metric is a function of :class:`Counts`, which holds the pairs under ``b`` weightings at once, and returns ``b``
values. A weighting in which each group counts once gives the metric itself, bootstrap counts give its distribution.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from statistics import NormalDist

import numpy as np

_CELLS = 1 << 17
"""Weighted pairs held at once, by each thread: arrays of 1 MiB stay in the cache. A resample is never divided."""
_BIN = 0.05
"""Width of the bins of :func:`overlap`: forty between -1 and 1."""
BIASED = frozenset({"ap", "best_f1", "best_f05", "calibration_retention", "overlap"})
"""Metrics whose bootstrap distribution lies beside the value, for a resample holds many pairs twice or more.

Percentile intervals of these cover the truth too seldom (docs/metrics.md). The bias of a change is small.
"""


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs, from the highest cosine down.

    Made by :func:`pairs_of` and :func:`pairs_of_triplets`.

    Attributes
    ----------
    similarity : numpy.ndarray, shape (n,), float64
        Cosines, falling.
    same : numpy.ndarray, shape (n,), bool
        Whether one answer serves both texts.
    group : numpy.ndarray, shape (n,), int64
        Number of the group that each belongs to; a group is drawn as a whole.
    groups : int
        Number of groups g.
    nearer : numpy.ndarray, shape (m,), bool
        For each triplet among them, whether its positive is nearer than its negative; empty for pairs.
    triplet_group : numpy.ndarray, shape (m,), int64
        The group of each triplet.
    """

    similarity: np.ndarray
    same: np.ndarray
    group: np.ndarray
    groups: int
    nearer: np.ndarray
    triplet_group: np.ndarray

    @cached_property
    def last_of_tie(self) -> np.ndarray | None:
        """Places of the last pair of each distinct cosine; None if all are distinct."""
        last = np.append(np.diff(self.similarity) != 0, True)
        return None if last.all() else np.flatnonzero(last)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """The distinct cosines, falling; shape (t,)."""
        return self.similarity if self.last_of_tie is None else self.similarity[self.last_of_tie]


def pairs_of(
    similarity: np.ndarray, same: np.ndarray, groups: Sequence[str], triplets: Sequence[str] | None = None
) -> Pairs:
    """Order labelled pairs by their cosine.

    Parameters
    ----------
    similarity : numpy.ndarray, shape (n,)
        Cosines, in [-1, 1].
    same : numpy.ndarray, shape (n,), bool
        Whether one answer serves both texts.
    groups : sequence of str, length n
        Group of each pair. Two models that are compared are given the same groups in the same order.
    triplets : sequence of str, length n, optional
        The triplet that each pair belongs to; a name that stands at one pair only is none.

    Returns
    -------
    Pairs
        The pairs.
    """
    similarity, same = np.asarray(similarity, dtype=np.float64), np.asarray(same, dtype=bool)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    nearer, triplet_group = np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)
    if triplets is not None:
        _, number = np.unique(np.asarray(triplets), return_inverse=True)
        positive = np.full(number.max(initial=-1) + 1, np.nan)
        negative = positive.copy()
        positive[number[same]], negative[number[~same]] = similarity[same], similarity[~same]
        owner = np.zeros(len(positive), dtype=np.int64)
        owner[number] = group
        whole = np.isfinite(positive) & np.isfinite(negative)
        nearer, triplet_group = (positive > negative)[whole], owner[whole]
    order = np.argsort(-similarity, kind="stable")
    return Pairs(similarity[order], same[order], group[order], len(names), nearer, triplet_group)


def pairs_of_triplets(positive: np.ndarray, negative: np.ndarray, groups: Sequence[str] | None = None) -> Pairs:
    """Order the pairs of triplets by their cosine: each triplet gives two.

    Parameters
    ----------
    positive, negative : numpy.ndarray, shape (m,)
        Cosines of anchor and positive, and of anchor and negative, in [-1, 1].
    groups : sequence of str, length m, optional
        Group of each triplet; by default each is one of its own.

    Returns
    -------
    Pairs
        The pairs.
    """
    numbers = np.arange(len(positive))
    groups = numbers if groups is None else np.asarray(groups)
    same = np.repeat([True, False], len(positive))
    return pairs_of(np.concatenate([positive, negative]), same, np.tile(groups, 2), np.tile(numbers, 2))


@dataclass(frozen=True)
class Counts:
    """Labelled pairs under b weightings of their groups.

    Attributes
    ----------
    pairs : Pairs
        The pairs.
    of_groups : numpy.ndarray, shape (b, g), float64
        How often each group counts.
    """

    pairs: Pairs
    of_groups: np.ndarray

    @cached_property
    def _weights(self) -> np.ndarray:
        """How often each pair counts; shape (b, n)."""
        return np.take(self.of_groups, self.pairs.group, axis=1)

    @cached_property
    def _right(self) -> np.ndarray:
        """How often each pair counts as one with the same answer; shape (b, n)."""
        return self._weights * self.pairs.same

    @cached_property
    def hits(self) -> np.ndarray:
        """Pairs with the same answer at or above each threshold; shape (b, t)."""
        return self._at_thresholds(self._right)

    @cached_property
    def made(self) -> np.ndarray:
        """All pairs at or above each threshold; shape (b, t)."""
        return self._at_thresholds(self._weights)

    @cached_property
    def false_hits(self) -> np.ndarray:
        """Pairs with another answer at or above each threshold; shape (b, t)."""
        return self.made - self.hits

    @property
    def positives(self) -> np.ndarray:
        """Number of pairs with the same answer; shape (b,)."""
        return self.hits[:, -1]

    @property
    def negatives(self) -> np.ndarray:
        """Number of pairs with another answer; shape (b,)."""
        return self.false_hits[:, -1]

    @cached_property
    def precision(self) -> np.ndarray:
        """Share of the pairs at or above each threshold that have the same answer, 0 without any; shape (b, t)."""
        return _share(self.hits, self.made)

    @cached_property
    def hit_steps(self) -> np.ndarray:
        """Pairs with the same answer at each threshold itself; shape (b, t)."""
        return self._right if self.pairs.last_of_tie is None else np.diff(self.hits, axis=1, prepend=0.0)

    @cached_property
    def average_precision(self) -> np.ndarray:
        """As :func:`average_precision`; shape (b,)."""
        return _share(np.einsum("bt,bt->b", self.hit_steps, self.precision), self.positives)

    @cached_property
    def p_chr_auc(self) -> np.ndarray:
        """As :func:`p_chr_auc`; shape (b,)."""
        made, precision = self.made, self.precision
        # Weights of zero leave thresholds without a hit at the start; their precision is the first real one.
        if (made[:, 0] == 0).any():
            first = np.argmax(made > 0, axis=1)
            precision = np.where(made > 0, precision, precision[np.arange(len(made)), first][:, None])
        # Twice the area of each trapezium, added up.
        area = np.einsum("bt,bt->b", np.diff(made, axis=1), precision[:, 1:] + precision[:, :-1])
        return _share(made[:, 0] * precision[:, 0] + area / 2, made[:, -1])

    @cached_property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean cosine of the pairs with the same answer, and of the others; each of shape (b,)."""
        right = self._right @ self.pairs.similarity
        wrong = self._weights @ self.pairs.similarity - right
        return _share(right, self.positives), _share(wrong, self.negatives)

    def at(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count hits and false hits at any thresholds.

        Parameters
        ----------
        thresholds : numpy.ndarray, shape (k,)
            Cosines; a pair at or above one hits.

        Returns
        -------
        hits, false_hits : numpy.ndarray, shape (b, k)
            How many.
        """
        above = np.searchsorted(-self.pairs.thresholds, -np.asarray(thresholds), side="right") - 1
        none = above < 0
        return tuple(np.where(none, 0.0, counted[:, above]) for counted in (self.hits, self.false_hits))

    def _at_thresholds(self, weights: np.ndarray) -> np.ndarray:
        """Add weights up from the highest cosine down, once for each distinct one."""
        sums = np.cumsum(weights, axis=1)
        return sums if self.pairs.last_of_tie is None else np.take(sums, self.pairs.last_of_tie, axis=1)


Metric = Callable[[Counts], np.ndarray]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, with 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def positive_similarity(counts: Counts) -> np.ndarray:
    """Return the mean cosine of the pairs with the same answer.

    Parameters
    ----------
    counts : Counts
        Weighted pairs.

    Returns
    -------
    numpy.ndarray, shape (b,)
        A value for each weighting.
    """
    return counts.means[0]


def negative_similarity(counts: Counts) -> np.ndarray:
    """Return the mean cosine of the pairs with another answer.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return counts.means[1]


def margin(counts: Counts) -> np.ndarray:
    """Return the mean positive less the mean negative similarity (seed document 000, "The Key Metric: Margin").

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return counts.means[0] - counts.means[1]


def accuracy(counts: Counts) -> np.ndarray:
    """Return the share of triplets whose positive is nearer than the negative (seed document 002); ties do not count.

    Parameters and returns are those of :func:`positive_similarity`; not a number without triplets.
    """
    weights = counts.of_groups[:, counts.pairs.triplet_group]
    total = weights.sum(axis=1)
    return np.where(total > 0, _share(weights @ counts.pairs.nearer.astype(np.float64), total), np.nan)


def average_precision(counts: Counts) -> np.ndarray:
    """Return the average precision of telling the pairs with the same answer from the others by their cosine.

    The sum over thresholds of precision times the step of recall, as ``sklearn.metrics.average_precision_score``; pairs
    with equal cosines share a threshold.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return counts.average_precision


def roc_auc(counts: Counts) -> np.ndarray:
    """Return the share of (same answer, other answer) pairs of pairs in the right order, ties half.

    As ``sklearn.metrics.roc_auc_score``.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    # For each pair with the same answer, those with another below it: all, less those at or above, and half the ties.
    above = np.einsum("bt,bt->b", counts.hit_steps, counts.false_hits)
    level = 0.0
    if counts.pairs.last_of_tie is not None:
        steps = np.diff(counts.made, axis=1, prepend=0.0) - counts.hit_steps
        level = np.einsum("bt,bt->b", counts.hit_steps, steps) / 2
    possible = counts.positives * counts.negatives
    return _share(possible - above + level, possible)


def best_f(beta: float) -> Metric:
    """Make the metric "highest F-beta that any threshold gives" (van Rijsbergen 1979, chapter 7).

    Parameters
    ----------
    beta : float
        What recall weighs beside precision; below 1, precision weighs more.

    Returns
    -------
    Metric
        As ``sklearn.metrics.fbeta_score`` at the best threshold of the set itself, which flatters every model alike.
    """

    def highest(counts: Counts) -> np.ndarray:
        square = beta * beta
        weighed = counts.made + square * counts.positives[:, None]
        # Nothing made and nothing to find is no success.
        return (1 + square) * np.divide(counts.hits, weighed, out=weighed, where=weighed > 0).max(axis=1)

    return highest


def p_chr_auc(counts: Counts) -> np.ndarray:
    """Return the area under precision against cache-hit ratio (P-CHR AUC, arXiv:2606.19719).

    The threshold goes down over the distinct cosines. At each, the cache-hit ratio is the share of all pairs that hit,
    and precision the share of hits that are right; between two, precision runs straight; before the first, it is the
    first's.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return counts.p_chr_auc


def calibration_retention(counts: Counts) -> np.ndarray:
    """Return the calibration retention rate: P-CHR AUC as a share of the AP (CRR, arXiv:2606.19719).

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return _share(counts.p_chr_auc, counts.average_precision)


def overlap(counts: Counts) -> np.ndarray:
    """Return what the histograms of the two kinds of pairs share (overlap coefficient; Inman & Bradley 1989).

    In bins of .05: the sum over bins of the smaller of the two shares. 0 is apart, 1 is the same.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    edges = np.arange(-1.0, 1.0 + _BIN, _BIN)[::-1] - 1e-9
    hits, false_hits = counts.at(edges)
    shares = (np.diff(_share(counted, counted[:, -1:]), axis=1, prepend=0.0) for counted in (hits, false_hits))
    return np.minimum(*shares).sum(axis=1)


def recall_at_budget(budget: float) -> Metric:
    """Make the metric "recall at a false-hit budget".

    The threshold is the lowest of the set's own cosines at which no more than the budgeted share of the pairs with
    another answer hits; it is read off the set that it is applied to, so it flatters every model alike.

    Parameters
    ----------
    budget : float
        Largest share of pairs with another answer that may hit, in (0, 1).

    Returns
    -------
    Metric
        The share of pairs with the same answer that hit at that threshold.
    """

    def recall(counts: Counts) -> np.ndarray:
        return _share(_at_budget(counts, counts.hits, budget), counts.positives)

    return recall


def hit_ratio_at_budget(budget: float) -> Metric:
    """Make the metric "cache-hit ratio at a false-hit budget".

    Parameters
    ----------
    budget : float
        Largest share of pairs with another answer that may hit, in (0, 1).

    Returns
    -------
    Metric
        The share of all pairs that hit at the threshold of :func:`recall_at_budget`.
    """

    def hit_ratio(counts: Counts) -> np.ndarray:
        return _share(_at_budget(counts, counts.made, budget), counts.made[:, -1])

    return hit_ratio


def _at_budget(counts: Counts, counted: np.ndarray, budget: float) -> np.ndarray:
    """Return what was counted, of shape (b,), at the lowest threshold within the budget."""
    # Both counts only grow, so the last threshold that is allowed has the most hits; none allowed means no hit.
    allowed = counts.false_hits <= budget * counts.negatives[:, None] + 1e-9
    last = np.count_nonzero(allowed, axis=1) - 1
    return np.where(last < 0, 0.0, counted[np.arange(len(counted)), last])


def registry(false_hit_budget: float) -> dict[str, Metric]:
    """Return the metrics by name.

    Parameters
    ----------
    false_hit_budget : float
        Budget of the two metrics that need one, in (0, 1).

    Returns
    -------
    dict of str to Metric
        In the order in which tables show them.
    """
    return {
        "margin": margin,
        "positive_similarity": positive_similarity,
        "negative_similarity": negative_similarity,
        "accuracy": accuracy,
        "ap": average_precision,
        "roc_auc": roc_auc,
        "best_f1": best_f(1),
        "best_f05": best_f(0.5),
        "p_chr_auc": p_chr_auc,
        "calibration_retention": calibration_retention,
        "overlap": overlap,
        "recall_at_budget": recall_at_budget(false_hit_budget),
        "hit_ratio_at_budget": hit_ratio_at_budget(false_hit_budget),
    }


def distributions(
    pairs: Pairs, metrics: Mapping[str, Metric], resamples: int, seed: int, threads: int = 1
) -> dict[str, np.ndarray]:
    """Compute metrics and their bootstrap distributions over groups: the pairs of one group come and go together.

    The draws depend on the numbers of pairs and groups and the seed only, so that two models on one set get the same:
    their difference is a paired comparison.

    Parameters
    ----------
    pairs : Pairs
        The pairs.
    metrics : mapping of str to Metric
        By name.
    resamples : int
        Number of resamples b (Efron & Tibshirani 1993).
    seed : int
        Seed of the draws.
    threads : int
        Threads that compute.

    Returns
    -------
    dict of str to numpy.ndarray, shape (1 + b, ...)
        The metric itself first.
    """

    def values(of_groups: np.ndarray) -> list[np.ndarray]:
        counts = Counts(pairs, of_groups)
        return [metric(counts) for metric in metrics.values()]

    with ThreadPoolExecutor(threads) as pool:
        # A few at a time: all at once would not fit into memory.
        weightings = chain([np.ones((1, pairs.groups))], _bootstrap(pairs, resamples, seed))
        found = []
        while some := list(islice(weightings, threads)):
            found += pool.map(values, some)
    return {name: np.concatenate(parts) for name, parts in zip(metrics, zip(*found, strict=True), strict=True)}


def _bootstrap(pairs: Pairs, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw how often each group counts, so many resamples at a time as fit."""
    random = np.random.default_rng(seed)
    at_once = max(1, _CELLS // max(1, len(pairs.similarity)))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        draws = random.integers(pairs.groups, size=(size, pairs.groups), dtype=np.int32)
        yield np.stack([np.bincount(draw, minlength=pairs.groups) for draw in draws]).astype(np.float64)


def interval(values: np.ndarray, confidence: float, corrected: bool = False) -> tuple[float, float]:
    """Return the bootstrap interval of a metric or of a difference.

    Parameters
    ----------
    values : numpy.ndarray, shape (1 + b,)
        The value and its bootstrap distribution; entries that are not finite are passed over.
    confidence : float
        Coverage, in (0, 1).
    corrected : bool
        False: the percentile interval (Efron & Tibshirani 1993, chapter 13). True, for :data:`BIASED` metrics: normal,
        with the bootstrap's standard error, around the value less the bootstrap's bias (the same, chapters 10 and 12).

    Returns
    -------
    low, high : float
        The interval.
    """
    value, drawn = values[0], values[1:][np.isfinite(values[1:])]
    tail = (1 - confidence) / 2
    if not corrected:
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return float(low), float(high)
    centre, width = 2 * value - drawn.mean(), NormalDist().inv_cdf(1 - tail) * drawn.std(ddof=1)
    # What is a share stays one.
    low, high = np.clip([centre - width, centre + width], 0, max(1, drawn.max()))
    return float(low), float(high)
