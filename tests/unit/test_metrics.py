import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score

from cachelora.metrics import (
    accuracy,
    average_precision,
    bootstrap_weights,
    hit_ratio_at_budget,
    interval,
    margin,
    negative_similarity,
    p_chr_auc,
    positive_similarity,
    recall_at_budget,
    registry,
)  # fmt: skip

POSITIVE = np.array([0.9, 0.5, 0.7, 0.2])
NEGATIVE = np.array([0.8, 0.6, 0.1, 0.2])
ONCE = np.ones((1, 4))

# Few distinct values, so that ties are common.
similarities = st.integers(-4, 4).map(lambda value: value / 4)


@st.composite
def weighted(draw):
    n = draw(st.integers(1, 12))
    positive = np.array(draw(st.lists(similarities, min_size=n, max_size=n)))
    negative = np.array(draw(st.lists(similarities, min_size=n, max_size=n)))
    counts = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(any))
    return positive, negative, np.array([counts], dtype=float)


def test_by_hand():
    assert positive_similarity(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(0.575)
    assert negative_similarity(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(0.425)
    assert margin(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(0.15)
    assert accuracy(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(0.5)  # .9>.8, .5<.6, .7>.1, .2=.2
    # Ranked: .9+ .8- .7+ .6- .5+ .2+- .1-; precision 1, 2/3, 3/5, 4/7, each a quarter of the recall.
    assert average_precision(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx((1 + 2 / 3 + 3 / 5 + 4 / 7) / 4)
    # One of four negatives may hit: down to .7 two positives and one negative do.
    assert recall_at_budget(0.25)(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(0.5)
    assert hit_ratio_at_budget(0.25)(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(3 / 8)
    # None may: the threshold is above .8.
    assert recall_at_budget(0.2)(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(0.25)


def test_p_chr_auc_by_hand():
    # Ranked: .9+ .8- .7+ .6- .5+ .2+- .1-; hit ratios in eighths, the tie in one step.
    ratios = [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 7 / 8, 1]
    precisions = [1, 1, 1 / 2, 2 / 3, 2 / 4, 3 / 5, 4 / 7, 4 / 8]
    assert p_chr_auc(POSITIVE, NEGATIVE, ONCE)[0] == pytest.approx(np.trapezoid(precisions, ratios))


@given(weighted())
def test_p_chr_auc_is_the_area_that_scikit_learn_finds(case):
    positive, negative, weights = case
    w = weights[0]
    points = []
    for threshold in sorted({*positive, *negative}, reverse=True):
        hits, false_hits = w[positive >= threshold].sum(), w[negative >= threshold].sum()
        if hits + false_hits:
            points.append(((hits + false_hits) / (2 * w.sum()), hits / (hits + false_hits)))
    points = [(0.0, points[0][1]), *points]
    assert p_chr_auc(positive, negative, weights)[0] == pytest.approx(auc(*zip(*points, strict=True)))


@given(weighted())
def test_average_precision_is_that_of_scikit_learn(case):
    positive, negative, weights = case
    labels = np.repeat([1, 0], len(positive))
    expected = average_precision_score(
        labels, np.concatenate([positive, negative]), sample_weight=np.tile(weights[0], 2)
    )
    assert average_precision(positive, negative, weights)[0] == pytest.approx(expected)


@given(weighted(), st.floats(0.01, 0.99))
def test_recall_at_budget_is_the_best_that_any_threshold_gives(case, budget):
    positive, negative, weights = case
    w, total = weights[0], weights.sum()
    best = 0.0
    for threshold in {*positive, *negative}:
        if w[negative >= threshold].sum() <= budget * total + 1e-9:
            best = max(best, w[positive >= threshold].sum() / total)
    assert recall_at_budget(budget)(positive, negative, weights)[0] == pytest.approx(best)


@given(weighted())
def test_weights_mean_repetition(case):
    positive, negative, weights = case
    times = weights[0].astype(int)
    repeated = np.repeat(positive, times), np.repeat(negative, times)
    once = np.ones((1, times.sum()))
    for metric in registry(0.1).values():
        assert metric(positive, negative, weights)[0] == pytest.approx(metric(*repeated, once)[0])


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), st.integers(0, 9))
def test_bootstrap_draws_whole_groups(groups, seed):
    weights = bootstrap_weights(groups, 50, seed)
    assert weights.shape == (50, len(groups))
    names = sorted(set(groups))
    per_group = np.stack([weights[:, groups.index(name)] for name in names])
    assert (per_group.sum(axis=0) == len(names)).all()
    for position, group in enumerate(groups):
        assert (weights[:, position] == per_group[names.index(group)]).all()


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        differences = random.normal(0.1, 0.2, size=80)
        weights = bootstrap_weights([str(i) for i in range(80)], 400, int(random.integers(1 << 30)))
        low, high = interval(margin(differences, np.zeros(80), weights), 0.95)
        covered += low <= 0.1 <= high
    # 380 expected; the percentile bootstrap covers a little less than it says at this size.
    assert 364 <= covered <= 394
