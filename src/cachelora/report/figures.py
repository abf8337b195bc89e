"""The figures of the report, as SVG."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cachelora.benchmark import BASE
from cachelora.evaluate import LOOK_ALIKES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY, _GREEN, _RED = "#777777", "#2a7f62", "#c8553d"
_MOST_FALSE_HITS = 0.1
"""Nobody wants a cache with more; at a threshold of 1 there is none, so some points are always below."""
_BINS = np.arange(-0.2, 1.0001, 0.05)


def _subplots(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> "tuple[Figure, np.ndarray]":
    """Make a figure of panels that comes out the same whenever it is drawn."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "cachelora", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False, **shared
    )
    return figure, axes


def _svg(figure: "Figure") -> str:
    """Return a figure as an element for a page of HTML, and let go of it."""
    from matplotlib import pyplot

    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def draw_by_kind(rows: pd.DataFrame, model: str) -> str:
    """Draw margin and AP by test set and kind of negative, with their intervals, before and after.

    Parameters
    ----------
    rows : pandas.DataFrame
        Measured rows of one base model in the benchmark table.
    model : str
        The model beside the base model.

    Returns
    -------
    str
        SVG.
    """
    sets, metrics = list(dict.fromkeys(rows["test_set"])), (("margin", "margin"), ("ap", "AP"))
    kinds = [kind for kind in dict.fromkeys(rows["kind"]) if kind != LOOK_ALIKES]
    figure, axes = _subplots(len(metrics), len(sets), (2.6, 2.4), sharey=True, sharex="row")
    for line, (metric, title) in zip(axes, metrics, strict=True):
        for axis, test_set in zip(line, sets, strict=True):
            for name, colour, up in ((BASE, _GREY, 0.15), (model, _GREEN, -0.15)):
                found = rows[(rows["test_set"] == test_set) & (rows["metric"] == metric) & (rows["model"] == name)]
                found = found[found["kind"].isin(kinds)]
                places = [len(kinds) - 1 - kinds.index(kind) + up for kind in found["kind"]]
                axis.hlines(places, found["low"], found["high"], color=colour)
                axis.plot(found["value"], places, "o", color=colour, markersize=4, label=name)
            axis.set_yticks(range(len(kinds)), [*reversed(kinds)])
            axis.set(title=test_set if metric == metrics[0][0] else "", xlabel=title)
            axis.axvline(0, color="#cccccc", zorder=0)
            axis.grid(axis="x", color="#eeeeee", zorder=0)
    axes[0, 0].legend(fontsize="small")
    return _svg(figure)


def draw_precision(curves: Mapping[str, pd.DataFrame]) -> str:
    """Draw precision against cache-hit ratio, a point for each threshold of the grid.

    Parameters
    ----------
    curves : mapping of str to pandas.DataFrame
        By model, in the columns of :data:`cachelora.schemas.CURVES`.

    Returns
    -------
    str
        SVG.
    """
    sets = list(dict.fromkeys(next(iter(curves.values()))["test_set"]))
    figure, axes = _subplots(1, len(sets), (2.6, 2.6), sharey=True)
    for axis, test_set in zip(axes[0], sets, strict=True):
        for (name, table), colour in zip(curves.items(), (_GREY, _GREEN), strict=False):
            wide = table[table["test_set"] == test_set].pivot(index="threshold", columns="metric")
            ratio, known = wide["value", "hit_ratio"], wide["value", "precision"].notna()
            axis.plot(ratio[known], wide["value", "precision"][known], color=colour, label=name)
            axis.fill_between(
                ratio[known].astype(float), wide["low", "precision"][known].astype(float),
                wide["high", "precision"][known].astype(float), color=colour, alpha=0.2, linewidth=0,
            )  # fmt: skip
        axis.set(title=test_set, xlabel="cache-hit ratio", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].set_ylabel("precision")
    axes[0, 0].legend(fontsize="small")
    return _svg(figure)


def draw_similarities(scores: Mapping[str, pd.DataFrame]) -> str:
    """Draw the cosines of the pairs with one answer and of the others, a row of panels for each model.

    Parameters
    ----------
    scores : mapping of str to pandas.DataFrame
        By model, in the columns of :data:`cachelora.schemas.SCORES`.

    Returns
    -------
    str
        SVG.
    """
    sets = list(dict.fromkeys(next(iter(scores.values()))["test_set"]))
    figure, axes = _subplots(len(scores), len(sets), (2.6, 1.8), sharex=True, sharey="col")
    for line, (name, table) in zip(axes, scores.items(), strict=True):
        for axis, test_set in zip(line, sets, strict=True):
            mine = table[table["test_set"] == test_set]
            for same, colour, label in ((True, _GREEN, "same answer"), (False, _RED, "another answer")):
                found = mine.loc[mine["same_answer"] == same, "similarity"].clip(_BINS[0], _BINS[-1])
                axis.hist(found, bins=_BINS, color=colour, alpha=0.5, label=label)
            axis.set_title(f"{test_set}, {name}")
    for axis in axes[-1]:
        axis.set_xlabel("cosine")
    axes[0, 0].legend(fontsize="small")
    return _svg(figure)


def draw_trainings(trainings: Mapping[str, pd.DataFrame]) -> str:
    """Draw loss and validation AP of each training over its steps.

    Parameters
    ----------
    trainings : mapping of str to pandas.DataFrame
        By model, what :func:`cachelora.train.curves.training_table` gives.

    Returns
    -------
    str
        SVG.
    """
    figure, axes = _subplots(1, 2, (5, 3))
    for name, table in trainings.items():
        for axis, column in zip(axes[0], ("loss", "ap"), strict=True):
            points = table[["step", column]].dropna()
            axis.plot(points["step"], points[column], marker=".", label=name)
    axes[0, 0].set(title="loss", xlabel="step")
    axes[0, 1].set(title="AP on the validation split", xlabel="step")
    axes[0, 1].legend(fontsize="small")
    return _svg(figure)


def draw_replay(courses: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw the cache-hit ratio over a stream of queries.

    Parameters
    ----------
    courses : mapping of str to sequence of (int, float)
        By what was replayed: queries so far, and the share of them that hit.

    Returns
    -------
    str
        SVG.
    """
    figure, axes = _subplots(1, 1, (8, 3.2))
    for name, course in courses.items():
        axes[0, 0].plot(*zip(*course, strict=True), label=name)
    axes[0, 0].set(xlabel="queries so far", ylabel="cache-hit ratio", ylim=(0, 1))
    axes[0, 0].legend(fontsize="small")
    return _svg(figure)


def draw_frontier(frontiers: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Draw the calls saved against the false hits, a point for each threshold of a grid.

    Parameters
    ----------
    frontiers : mapping of str to sequence of mapping
        By model, what :func:`cachelora.replay.frontier` gives.

    Returns
    -------
    str
        SVG.
    """
    figure, axes = _subplots(1, 1, (8, 3.6))
    for (name, points), colour in zip(frontiers.items(), (_GREY, _GREEN), strict=False):
        false_hits, saved = ([point[key] for point in points] for key in ("false_hit_share", "calls_saved"))
        axes[0, 0].plot(false_hits, saved, "o-", color=colour, markersize=3, label=name)
        for point in points[::4]:
            if point["false_hit_share"] <= _MOST_FALSE_HITS:
                place = (point["false_hit_share"], point["calls_saved"])
                axes[0, 0].annotate(f" {point['threshold']:.2f}", place, fontsize="small", color=colour, va="top")
    seen = [
        point["calls_saved"]
        for points in frontiers.values()
        for point in points
        if point["false_hit_share"] <= _MOST_FALSE_HITS
    ]
    axes[0, 0].set(xlim=(-0.002, _MOST_FALSE_HITS), ylim=(min(seen) - 0.01, max(seen) + 0.01))
    axes[0, 0].set(xlabel="false hits, share of the queries", ylabel="calls saved, share of the queries")
    axes[0, 0].legend(fontsize="small", loc="lower right")
    return _svg(figure)
