import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, fbeta_score, roc_auc_score

from cachelora.metrics import (
    Counts,
    accuracy,
    average_precision,
    best_f,
    calibration_retention,
    distributions,
    hit_ratio_at_budget,
    interval,
    margin,
    negative_similarity,
    overlap,
    p_chr_auc,
    pairs_of,
    pairs_of_triplets,
    positive_similarity,
    recall_at_budget,
    registry,
    roc_auc,
)  # fmt: skip

POSITIVE = np.array([0.9, 0.5, 0.7, 0.2])
NEGATIVE = np.array([0.8, 0.6, 0.1, 0.2])

# Few distinct values, so that ties are common.
similarities = st.integers(-4, 4).map(lambda value: value / 4)


@st.composite
def weighted(draw):
    """Labelled pairs, each a group of its own, and how often each counts; both labels count."""
    rows = st.tuples(similarities, st.booleans(), st.integers(0, 3))
    found = draw(
        st.lists(rows, min_size=2, max_size=20).filter(lambda rows: {same for _, same, n in rows if n} == {True, False})
    )
    similarity, same, times = (np.array(column) for column in zip(*found, strict=True))
    return similarity, same, times.astype(float)


def value(metric, similarity, same, weights):
    numbers = np.arange(len(same))
    return metric(Counts(pairs_of(similarity, same, numbers), weights[np.newaxis]))[0]


def of_triplets(metric):
    return metric(Counts(pairs_of_triplets(POSITIVE, NEGATIVE), np.ones((1, 4))))[0]


def test_by_hand():
    assert of_triplets(positive_similarity) == pytest.approx(0.575)
    assert of_triplets(negative_similarity) == pytest.approx(0.425)
    assert of_triplets(margin) == pytest.approx(0.15)
    assert of_triplets(accuracy) == pytest.approx(0.5)  # .9>.8, .5<.6, .7>.1, .2=.2
    # Ranked: .9+ .8- .7+ .6- .5+ .2+- .1-; precision 1, 2/3, 3/5, 4/7, each a quarter of the recall.
    assert of_triplets(average_precision) == pytest.approx((1 + 2 / 3 + 3 / 5 + 4 / 7) / 4)
    # Of the 16 pairs of one of each, .9 is above 4 negatives, .7 above 3, .5 above 2, .2 above 1 and level with one.
    assert of_triplets(roc_auc) == pytest.approx((4 + 3 + 2 + 1.5) / 16)
    # At .2, four hits and three false ones; at .7, two and one.
    assert of_triplets(best_f(1)) == pytest.approx(2 * 4 / (4 + 7))
    assert of_triplets(best_f(0.5)) == pytest.approx(1.25 * 2 / (0.25 * 4 + 3))
    # One of four negatives may hit: down to .7 two positives and one negative do.
    assert of_triplets(recall_at_budget(0.25)) == pytest.approx(0.5)
    assert of_triplets(hit_ratio_at_budget(0.25)) == pytest.approx(3 / 8)
    # None may: the threshold is above .8.
    assert of_triplets(recall_at_budget(0.2)) == pytest.approx(0.25)
    # Only the two at .2 share a bin.
    assert of_triplets(overlap) == pytest.approx(0.25)


def test_p_chr_auc_by_hand():
    # Ranked: .9+ .8- .7+ .6- .5+ .2+- .1-; hit ratios in eighths, the tie in one step.
    ratios = [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 7 / 8, 1]
    precisions = [1, 1, 1 / 2, 2 / 3, 2 / 4, 3 / 5, 4 / 7, 4 / 8]
    assert of_triplets(p_chr_auc) == pytest.approx(np.trapezoid(precisions, ratios))
    assert of_triplets(calibration_retention) == pytest.approx(of_triplets(p_chr_auc) / of_triplets(average_precision))


@given(weighted())
def test_p_chr_auc_is_the_area_that_scikit_learn_finds(case):
    similarity, same, weights = case
    points = []
    for threshold in sorted({*similarity}, reverse=True):
        hit = similarity >= threshold
        if weights[hit].sum():
            points.append((weights[hit].sum() / weights.sum(), weights[hit & same].sum() / weights[hit].sum()))
    points = [(0.0, points[0][1]), *points]
    assert value(p_chr_auc, *case) == pytest.approx(auc(*zip(*points, strict=True)))


@given(weighted())
def test_ranking_metrics_are_those_of_scikit_learn(case):
    similarity, same, weights = case
    expected = average_precision_score(same, similarity, sample_weight=weights)
    assert value(average_precision, *case) == pytest.approx(expected)
    assert value(roc_auc, *case) == pytest.approx(roc_auc_score(same, similarity, sample_weight=weights))


@given(weighted(), st.sampled_from([0.5, 1.0]))
def test_best_f_is_the_best_of_scikit_learn_over_thresholds(case, beta):
    similarity, same, weights = case
    best = max(
        fbeta_score(same, similarity >= threshold, beta=beta, sample_weight=weights, zero_division=0)
        for threshold in {*similarity}
    )
    assert value(best_f(beta), *case) == pytest.approx(best)


@given(weighted())
def test_overlap_is_that_of_numpy_histograms(case):
    similarity, same, weights = case
    # Bins that hold one of the possible values each.
    edges = np.arange(-1.125, 1.25, 0.25)
    ones, others = (
        np.histogram(similarity[of], edges, weights=weights[of])[0] / weights[of].sum() for of in (same, ~same)
    )
    assert value(overlap, *case) == pytest.approx(np.minimum(ones, others).sum())


@given(weighted(), st.floats(0.01, 0.99))
def test_recall_at_budget_is_the_best_that_any_threshold_gives(case, budget):
    similarity, same, weights = case
    best = 0.0
    for threshold in {*similarity}:
        hit = similarity >= threshold
        if weights[hit & ~same].sum() <= budget * weights[~same].sum() + 1e-9:
            best = max(best, weights[hit & same].sum() / weights[same].sum())
    assert value(recall_at_budget(budget), *case) == pytest.approx(best)


@given(weighted())
def test_weights_mean_repetition(case):
    similarity, same, weights = case
    times = weights.astype(int)
    repeated = np.repeat(similarity, times), np.repeat(same, times), np.ones(times.sum())
    for name, metric in registry(0.1).items():
        if name != "accuracy":
            assert value(metric, *case) == pytest.approx(value(metric, *repeated)), name


@given(st.lists(st.tuples(similarities, similarities, st.sampled_from("abcde")), min_size=1, max_size=20))
def test_triplets_are_their_two_pairs_and_the_order_of_rows_does_not_matter(rows):
    positive, negative, groups = (np.array(column) for column in zip(*rows, strict=True))
    pairs = pairs_of_triplets(positive, negative, groups)
    order = np.random.default_rng(1).permutation(2 * len(rows))
    shuffled = pairs_of(
        np.concatenate([positive, negative])[order],
        np.repeat([True, False], len(rows))[order],
        np.tile(groups, 2)[order],
        np.tile(np.arange(len(rows)), 2)[order],
    )
    for name, metric in registry(0.1).items():
        ones, others = (distributions(of, {name: metric}, 20, 3)[name] for of in (pairs, shuffled))
        assert ones == pytest.approx(others), name
    assert distributions(pairs, {"a": accuracy}, 0, 0)["a"][0] == pytest.approx((positive > negative).mean())


def test_pairs_without_triplets_have_no_accuracy():
    pairs = pairs_of(np.array([0.9, 0.1]), np.array([True, False]), ["a", "b"], ["1", "2"])
    assert np.isnan(distributions(pairs, {"accuracy": accuracy}, 0, 0)["accuracy"][0])


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), st.integers(0, 9))
def test_bootstrap_draws_whole_groups(groups, seed):
    pairs = pairs_of_triplets(np.zeros(len(groups)), np.zeros(len(groups)), groups)
    drawn = distributions(pairs, {"counts": lambda counts: counts.of_groups}, 50, seed)["counts"]
    assert drawn.shape == (51, len(set(groups)))
    assert (drawn[0] == 1).all()
    assert (drawn.sum(axis=1) == len(set(groups))).all()


def test_threads_and_portions_change_nothing(monkeypatch):
    random = np.random.default_rng(4)
    pairs = pairs_of(random.normal(size=300), random.random(300) < 0.5, random.integers(80, size=300).astype(str))
    whole = distributions(pairs, registry(0.05), 30, 7)
    threaded = distributions(pairs, registry(0.05), 30, 7, threads=3)
    for name, values in whole.items():
        np.testing.assert_array_equal(values, threaded[name])
    monkeypatch.setattr("cachelora.metrics._CELLS", 1000)
    assert len(distributions(pairs, {"margin": margin}, 30, 7, threads=2)["margin"]) == 31


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        pairs = pairs_of_triplets(random.normal(0.1, 0.2, size=80), np.zeros(80))
        drawn = distributions(pairs, {"margin": margin}, 400, int(random.integers(1 << 30)))["margin"]
        low, high = interval(drawn, 0.95)
        covered += low <= 0.1 <= high
    # 380 expected; the percentile bootstrap covers a little less than it says at this size.
    assert 364 <= covered <= 394
