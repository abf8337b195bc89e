"""How often the intervals cover the truth, and how often a threshold breaks its budget. See docs/metrics.md.

python benchmarks/coverage.py intervals 40 123 400
python benchmarks/coverage.py thresholds 123 570 2000

Test sets are drawn from a made-up world whose true figures are known: groups of one to four triplets, whose anchors are
easier or harder together, with about the similarities that the base model has on the shipped test sets.
"""

import argparse

import numpy as np
from tabulate import tabulate

from cachelora.metrics import BIASED, Pairs, distributions, interval, pairs_of_triplets, registry
from cachelora.thresholds import fit_threshold

BUDGET = 0.05
DRAWS, RESAMPLES = 1000, 1000
WORLD = 200_000
EASIER = 0.2
"""So much less alike are the negatives where thresholds are chosen: else more than 1 % have a cosine of 1."""


def world(random: np.random.Generator, groups: int, largest: int, easier: float = 0.0) -> tuple[np.ndarray, ...]:
    """Draw triplets: similarities of positives, of negatives, of a better model's positives; and their groups."""
    sizes = random.integers(1, largest + 1, groups)
    group = np.repeat(np.arange(groups), sizes)
    anchor, subject = random.normal(0, 0.08, groups)[group], random.normal(0, 0.06, groups)[group]
    positive = np.clip(0.68 + anchor + random.normal(0, 0.13, len(group)), -1, 1)
    negative = np.clip(0.66 - easier + anchor + subject + random.normal(0, 0.16, len(group)), -1, 1)
    better = np.clip(positive + 0.06 + random.normal(0, 0.08, len(group)), -1, 1)
    return positive, negative, better, group


def drawn(pairs: Pairs, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Return every metric with its bootstrap distribution."""
    return distributions(pairs, registry(BUDGET), resamples, seed)


def intervals(sizes: list[int], largest: int) -> None:
    """Print how often intervals cover the truth, for the metrics and for the change between two models."""
    random = np.random.default_rng(1)
    positive, negative, better, group = world(random, WORLD, largest)
    truth = {name: values[0] for name, values in drawn(pairs_of_triplets(positive, negative, group), 0, 0).items()}
    other = {name: values[0] for name, values in drawn(pairs_of_triplets(better, negative, group), 0, 0).items()}
    rows = []
    for groups in sizes:
        covered = {name: np.zeros(2) for name in truth}
        for _ in range(DRAWS):
            positive, negative, better, group = world(random, groups, largest)
            seed = int(random.integers(1 << 31))
            one = drawn(pairs_of_triplets(positive, negative, group), RESAMPLES, seed)
            two = drawn(pairs_of_triplets(better, negative, group), RESAMPLES, seed)
            for name in truth:
                low, high = interval(one[name], 0.95, corrected=name in BIASED)
                covered[name][0] += low <= truth[name] <= high
                low, high = interval(two[name] - one[name], 0.95)
                # Nothing but rounding changes the similarity of negatives here.
                covered[name][1] += low - 1e-9 <= other[name] - truth[name] <= high + 1e-9
        rows += [
            (groups, name, f"{truth[name]:.3f}", *(f"{share:.1%}" for share in covered[name] / DRAWS)) for name in truth
        ]
    print(tabulate(rows, ["groups", "metric", "truth", "covered", "change covered"], tablefmt="github"))


def thresholds(sizes: list[int], largest: int) -> None:
    """Print how often a chosen threshold has a higher false-hit rate than its budget."""
    random = np.random.default_rng(2)
    _, everything, *_ = world(random, WORLD, largest, EASIER)
    everything = np.sort(everything)
    rows = []
    for groups in sizes:
        for budget in (0.01, 0.02, 0.05):
            broken, none, rates = 0, 0, []
            for _ in range(10 * DRAWS):
                _, negative, _, group = world(random, groups, largest, EASIER)
                found = fit_threshold(negative, group, budget, 0.95).value
                if found is None:
                    none += 1
                    continue
                rate = 1 - np.searchsorted(everything, found) / len(everything)
                rates.append(rate)
                broken += rate > budget
            mean = f"{np.mean(rates):.2%}" if rates else ""
            rows.append((groups, f"{budget:.0%}", f"{none / DRAWS / 10:.1%}", mean, f"{broken / DRAWS / 10:.1%}"))
    print(tabulate(rows, ["groups", "budget", "cannot be met", "mean rate", "budget broken"], tablefmt="github"))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["intervals", "thresholds"])
    parser.add_argument("groups", nargs="+", type=int)
    parser.add_argument("--largest", type=int, default=4, help="triplets of the largest groups")
    arguments = parser.parse_args()
    {"intervals": intervals, "thresholds": thresholds}[arguments.what](arguments.groups, arguments.largest)


if __name__ == "__main__":
    main()
