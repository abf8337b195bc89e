"""The course of a training, as a table and as a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cachelora.files import replacing, write_text
from cachelora.train.validation import METRICS

_LOGGED = {"loss": "loss", "grad_norm": "gradient_norm", "learning_rate": "learning_rate"}


def training_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Put what was logged and what was measured in rows.

    Parameters
    ----------
    metrics : mapping
        What :func:`cachelora.train.train_model` returns.

    Returns
    -------
    pandas.DataFrame
        With columns step, loss (mean since the row above), gradient_norm and learning_rate (of that step), and the
        validation metrics at the steps at which they were taken.
    """
    logged = [{"step": entry["step"], **{new: entry[old] for old, new in _LOGGED.items()}} for entry in metrics["log"]]
    measured = [{name: row[name] for name in ("step", *METRICS)} for row in metrics["validation"]]
    frames = (
        pd.DataFrame(logged, columns=["step", *_LOGGED.values()]),
        pd.DataFrame(measured, columns=["step", *METRICS]),
    )
    return frames[0].merge(frames[1], on="step", how="outer").sort_values("step", ignore_index=True)


def write_training(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write :func:`training_table` as CSV.

    Parameters
    ----------
    path : str or Path
        The file.
    metrics : mapping
        What :func:`cachelora.train.train_model` returns.
    """
    write_text(path, training_table(metrics).to_csv(index=False))


def draw_training(path: str | Path, metrics: Mapping[str, Any], title: str) -> None:
    """Draw loss, gradient norm and learning rate over the steps, beside the validation metrics.

    Parameters
    ----------
    path : str or Path
        The SVG file.
    metrics : mapping
        What :func:`cachelora.train.train_model` returns.
    title : str
        What stands above.
    """
    import matplotlib

    matplotlib.use("svg")
    # The same file for the same training.
    matplotlib.rcParams["svg.hashsalt"] = "cachelora"
    from matplotlib import pyplot

    table = training_table(metrics)
    panels = [(name, [name]) for name in _LOGGED.values()] + [("validation", list(METRICS))]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 3.5), layout="constrained")
    for axis, (name, columns) in zip(axes, panels, strict=True):
        for column in columns:
            points = table[["step", column]].dropna()
            axis.plot(points["step"], points[column], marker=".", label=column)
        axis.set(title=name, xlabel="step")
    axes[-1].axvline(metrics["best_step"], color="grey", linestyle=":", label="kept")
    axes[-1].legend(fontsize="small")
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)
