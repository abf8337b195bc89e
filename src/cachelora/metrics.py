"""What a cache gets from a model, with intervals. Every function works on many weightings of the triplets at once.

A metric is a function of the positive similarities ``(n,)``, the negative similarities ``(n,)`` and weights ``(b, n)``
that returns ``b`` values: one for each row of weights. Weights of one give the metric itself, bootstrap counts give its
bootstrap distribution.
"""

from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def positive_similarity(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean cosine of anchor and positive.

    Parameters
    ----------
    positive, negative : numpy.ndarray, shape (n,)
        Cosines, in [-1, 1].
    weights : numpy.ndarray, shape (b, n)
        How often each triplet counts.

    Returns
    -------
    numpy.ndarray, shape (b,)
        Weighted means.
    """
    return weights @ positive / weights.sum(axis=1)


def negative_similarity(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean cosine of anchor and negative.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return weights @ negative / weights.sum(axis=1)


def margin(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean positive less the mean negative similarity (seed document 000, "The Key Metric: Margin").

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return weights @ (positive - negative) / weights.sum(axis=1)


def accuracy(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of triplets whose positive is nearer than the negative (seed document 002); ties do not count.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    return weights @ (positive > negative) / weights.sum(axis=1)


def average_precision(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the average precision of telling positive from negative pairs by their cosine.

    The sum over thresholds of precision times the step of recall, as ``sklearn.metrics.average_precision_score``; pairs
    with equal cosines share a threshold.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    hits, false_hits = _hits_by_threshold(positive, negative, weights)
    steps = np.diff(hits, axis=1, prepend=0.0)
    return (steps * hits / np.maximum(hits + false_hits, 1e-12)).sum(axis=1) / hits[:, -1]


def p_chr_auc(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under precision against cache-hit ratio (P-CHR AUC, arXiv:2606.19719).

    The threshold goes down over the distinct cosines. At each, the cache-hit ratio is the share of all pairs that hit,
    and precision the share of hits that are right; between two, precision runs straight; before the first, it is the
    first's.

    Parameters and returns are those of :func:`positive_similarity`.
    """
    hits, false_hits = _hits_by_threshold(positive, negative, weights)
    made = hits + false_hits
    precision = hits / np.maximum(made, 1e-12)
    ratio = made / made[:, -1:]
    # Bootstrap weights of zero leave thresholds without a hit at the start; their precision is the first real one.
    first = np.argmax(made > 0, axis=1)
    precision = np.where(made > 0, precision, precision[np.arange(len(made)), first][:, np.newaxis])
    steps = np.diff(ratio, axis=1, prepend=0.0)
    before = np.concatenate([precision[:, :1], precision[:, :-1]], axis=1)
    return (steps * (precision + before) / 2).sum(axis=1)


def recall_at_budget(budget: float) -> Metric:
    """Make the metric "recall at a false-hit budget".

    The threshold is the lowest of the set's own cosines at which no more than the budgeted share of the negatives hits;
    it is read off the set that it is applied to, so it flatters every model alike.

    Parameters
    ----------
    budget : float
        Largest share of negatives that may hit, in (0, 1).

    Returns
    -------
    Metric
        The share of positives that hit at that threshold.
    """

    def recall(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
        hits, _ = _at_budget(positive, negative, weights, budget)
        return hits / weights.sum(axis=1)

    return recall


def hit_ratio_at_budget(budget: float) -> Metric:
    """Make the metric "cache-hit ratio at a false-hit budget", for as many positives as negatives.

    Parameters
    ----------
    budget : float
        Largest share of negatives that may hit, in (0, 1).

    Returns
    -------
    Metric
        The share of all pairs that hit at the threshold of :func:`recall_at_budget`.
    """

    def hit_ratio(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
        hits, false_hits = _at_budget(positive, negative, weights, budget)
        return (hits + false_hits) / (2 * weights.sum(axis=1))

    return hit_ratio


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
        "p_chr_auc": p_chr_auc,
        "recall_at_budget": recall_at_budget(false_hit_budget),
        "hit_ratio_at_budget": hit_ratio_at_budget(false_hit_budget),
    }


def bootstrap_weights(groups: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """Draw bootstrap weights by group: triplets of one group come and go together.

    The draw depends on the number of groups and the seed only, so that two models on one test set get the same one:
    their difference is a paired comparison.

    Parameters
    ----------
    groups : sequence of str, length n
        Group of each triplet.
    resamples : int
        Number of resamples b.
    seed : int
        Seed of the draw.

    Returns
    -------
    numpy.ndarray, shape (b, n), float64
        How often each triplet counts in each resample.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return draws[:, member].astype(np.float64)


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Parameters
    ----------
    values : numpy.ndarray, shape (b,)
        Bootstrap distribution of a metric or of a difference; entries that are not finite are passed over.
    confidence : float
        Coverage, in (0, 1).

    Returns
    -------
    low, high : float
        The interval.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[np.isfinite(values)], [tail, 1 - tail])
    return float(low), float(high)


def _hits_by_threshold(
    positive: np.ndarray, negative: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count weighted hits and false hits at each distinct cosine, from the highest down; both of shape (b, t)."""
    similarity = np.concatenate([positive, negative])
    order = np.argsort(-similarity, kind="stable")
    last_of_tie = np.append(np.diff(similarity[order]) != 0, True)
    nothing = np.zeros_like(weights)
    hits = np.concatenate([weights, nothing], axis=1)[:, order].cumsum(axis=1)[:, last_of_tie]
    false_hits = np.concatenate([nothing, weights], axis=1)[:, order].cumsum(axis=1)[:, last_of_tie]
    return hits, false_hits


def _at_budget(
    positive: np.ndarray, negative: np.ndarray, weights: np.ndarray, budget: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return weighted hits and false hits, each of shape (b,), at the lowest threshold within the budget."""
    hits, false_hits = _hits_by_threshold(positive, negative, weights)
    allowed = false_hits <= budget * weights.sum(axis=1, keepdims=True) + 1e-9
    # Both counts only grow, so the last threshold that is allowed has the most hits; none allowed means no hit.
    last = allowed.sum(axis=1) - 1
    rows = np.arange(len(weights))
    none = last < 0
    return np.where(none, 0.0, hits[rows, last]), np.where(none, 0.0, false_hits[rows, last])
