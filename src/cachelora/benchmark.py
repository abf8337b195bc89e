"""Stage `benchmark`: one table of all models on all test sets, with the seeds' published margins beside ours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cachelora.errors import ConfigError
from cachelora.evaluate import ALL_KINDS, LOOK_ALIKES

_COLUMNS = (
    ("margin", "margin"),
    ("ap", "AP"),
    ("accuracy", "accuracy"),
    ("recall_at_budget", "recall"),
    ("hit_ratio_at_budget", "hit ratio"),
)
_OVERVIEWS = (
    (ALL_KINDS, "margin", "Margin"),
    (ALL_KINDS, "ap", "AP"),
    (LOOK_ALIKES, "accuracy", "Accuracy on look-alikes (every kind of negative but topic)"),
    ("topic", "margin", "Margin on easy negatives (kind topic)"),
)


class Published(BaseModel):
    """A margin that the seeds published.

    Attributes
    ----------
    source : str
        The document.
    setup : str
        What was trained, in a few words.
    base_model : str
        Its base model.
    domain : str
        The domain.
    base_margin, margin : float or None
        Before and after, where both are given.
    relative_change : float
        The published gain, as a share of the base margin.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    setup: str
    base_model: str
    domain: str
    base_margin: float | None = None
    margin: float | None = None
    relative_change: float


def read_published(path: str | Path) -> list[Published]:
    """Read the published numbers.

    Parameters
    ----------
    path : str or Path
        YAML with a list under ``margins``.

    Returns
    -------
    list of Published
        In the file's order.

    Raises
    ------
    ConfigError
        If the file is not of that form.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["margins"]
        return [Published.model_validate(entry) for entry in entries]
    except (yaml.YAMLError, KeyError, TypeError, ValidationError, UnicodeDecodeError) as error:
        first = str(error).strip().replace("\n", " ")[:160]
        raise ConfigError(
            str(path), f"not a list of published margins ({first})", "Compare with the shipped file"
        ) from error


def benchmark_table(evaluations: Sequence[dict[str, Any]], published: Sequence[Published]) -> pd.DataFrame:
    """Put all evaluations into one long table, with the published margins of the same domains.

    Parameters
    ----------
    evaluations : sequence of dict
        What the stage `evaluate` writes: base_model, model, results.
    published : sequence of Published
        The seeds' numbers.

    Returns
    -------
    pandas.DataFrame
        A row for each base model, model, test set, kind and metric, with value, change and intervals; ``source`` is
        "measured", or "published: " and the document.
    """
    rows = [
        {"source": "measured", "base_model": evaluation["base_model"], "model": evaluation["model"], **result}
        for evaluation in evaluations
        for result in evaluation["results"]
    ]
    test_sets = {row["test_set"] for row in rows}
    rows += [
        {
            "source": f"published: {entry.source}",
            "base_model": entry.base_model,
            "model": entry.setup,
            "test_set": entry.domain,
            "kind": ALL_KINDS,
            "metric": "margin",
            "value": entry.margin,
            "relative_change": entry.relative_change,
        }
        for entry in published
        if entry.domain in test_sets
    ]
    return pd.DataFrame(rows)


def benchmark_markdown(
    table: pd.DataFrame,
    published: Sequence[Published],
    confidence: float,
    false_hit_budget: float,
    repeats: Mapping[str, Sequence[str]],
) -> str:
    """Write the table for reading.

    Parameters
    ----------
    table : pandas.DataFrame
        What :func:`benchmark_table` gives.
    published : sequence of Published
        The seeds' numbers.
    confidence : float
        Coverage of the intervals.
    false_hit_budget : float
        Budget of recall and hit ratio.
    repeats : mapping of str to sequence of str
        Models that differ in nothing but seeds, by the first one's id.

    Returns
    -------
    str
        Markdown: overviews, the models of several seeds, for each base model and test set a table with the published
        numbers below it, and the changes by kind.
    """
    sections = [
        "# Benchmark",
        "margin = mean cos(anchor, positive) - mean cos(anchor, negative). Each value stands before its "
        f"{100 * confidence:g} % bootstrap interval over groups; Δ is the paired change from the base model, * where "
        "its interval excludes zero; sets of fewer than ten groups have no intervals. Recall and hit ratio: at the "
        f"lowest threshold at which no more than {100 * false_hit_budget:g} % of the set's negatives hit. Relative "
        "changes are given only where the base margin's interval lies above zero. Published: margins that the seeds of "
        "this project published for the same domain, on other test sets and partly other base models, without "
        "intervals; not measured here.",
    ]
    table = table[table["source"] == "measured"]
    overall = table[table["kind"] == ALL_KINDS]
    for base, rows in table.groupby("base_model", sort=False):
        for kind, metric, title in _OVERVIEWS:
            chosen = rows[(rows["kind"] == kind) & (rows["metric"] == metric)]
            if len(chosen):
                sections += [f"## {title} by test set, base model {base}", _overview_table(chosen)]
        if repeats:
            sections += [
                f"## Over seeds, base model {base}",
                "Mean, lowest and highest of the changes from the base model, by what was measured.",
                _seed_table(rows, repeats),
            ]
    for (base, test_set), rows in overall.groupby(["base_model", "test_set"], sort=False):
        n = int(rows["n"].iloc[0])
        size = "1 triplet" if n == 1 else f"{n} triplets"
        version = rows["test_version"].iloc[0]
        sections += [f"## {test_set} ({size}, {version}), base model {base}", _model_table(rows)]
        beside = [entry for entry in published if entry.domain == test_set]
        if beside:
            sections += [f"Published for {test_set}, not measured here:", _published_table(beside)]
    for base, rows in table.groupby("base_model", sort=False):
        sections += [f"## Change of the margin by kind of negative, base model {base}", _kind_table(rows)]
        sections += [f"## Change of the AP by kind of negative, base model {base}", _kind_table(rows, "ap")]
    return "\n\n".join(sections) + "\n"


def _overview_table(rows: pd.DataFrame) -> str:
    """Make the table of one metric: a row a model, a column a test set; the base model's value, the others' changes."""
    cells = [_value(row) if row["model"] == "base" else _change(row) for _, row in rows.iterrows()]
    wide = rows.assign(cell=cells).pivot(index="model", columns="test_set", values="cell")
    wide = wide.loc[list(dict.fromkeys(rows["model"])), list(dict.fromkeys(rows["test_set"]))].reset_index()
    return wide.to_markdown(index=False, disable_numparse=True)


def _seed_table(rows: pd.DataFrame, repeats: Mapping[str, Sequence[str]]) -> str:
    """Make the table of models of several seeds: a row for each of them and metric, a column a test set."""
    lines = []
    for kind, metric, title in _OVERVIEWS:
        measured = rows[(rows["kind"] == kind) & (rows["metric"] == metric)]
        for first, names in repeats.items():
            line = {"measured": title, "model": first, "seeds": str(len(names))}
            for test_set, found in measured[measured["model"].isin(names)].groupby("test_set", sort=False)["change"]:
                line[test_set] = f"{found.mean():+.3f} [{found.min():+.3f}, {found.max():+.3f}]"
            lines.append(line)
    return pd.DataFrame(lines).fillna("").to_markdown(index=False, disable_numparse=True)


def _model_table(rows: pd.DataFrame) -> str:
    """Make the table of one test set: a row a model."""
    lines = []
    for model, metrics in rows.groupby("model", sort=False):
        by_name = metrics.set_index("metric")
        line = {"model": model}
        for metric, title in _COLUMNS:
            row = by_name.loc[metric]
            line[title] = _value(row)
            if metric in ("margin", "ap", "accuracy"):
                line[f"Δ {title}"] = "" if model == "base" else _change(row)
        relative = by_name.loc["margin", "relative_change"]
        line["Δ margin %"] = "" if model == "base" else "n/a" if pd.isna(relative) else f"{relative:+.0%}"
        lines.append(line)
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


def _kind_table(rows: pd.DataFrame, metric: str = "margin") -> str:
    """Make the table of changes by kind: a row a test set and model."""
    together = rows["kind"].isin((ALL_KINDS, LOOK_ALIKES))
    chosen = rows[(rows["metric"] == metric) & (rows["model"] != "base") & ~together]
    chosen = chosen.assign(shown=[_change(row) for _, row in chosen.iterrows()])
    wide = chosen.pivot(index=["test_set", "model"], columns="kind", values="shown")
    order = chosen[["test_set", "model"]].drop_duplicates().itertuples(index=False, name=None)
    wide = wide.loc[sorted(order), list(dict.fromkeys(chosen["kind"]))].fillna("").reset_index()
    return wide.rename(columns={"test_set": "test set"}).to_markdown(index=False, disable_numparse=True)


def _value(row: pd.Series) -> str:
    """Show a value with its interval, if it has one."""
    return f"{row['value']:.3f}" + ("" if pd.isna(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]")


def _change(row: pd.Series) -> str:
    """Show a change with its interval, if it has one, and a star where that excludes zero."""
    if pd.isna(row["change_low"]):
        return f"{row['change']:+.3f}"
    star = "*" if row["change_low"] > 0 or row["change_high"] < 0 else ""
    return f"{row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}]{star}"


def _published_table(published: Sequence[Published]) -> str:
    """Make the table of published margins."""
    lines = [
        {
            "base margin": "" if entry.base_margin is None else f"{entry.base_margin:.4f}",
            "margin": "" if entry.margin is None else f"{entry.margin:.4f}",
            "Δ margin %": f"{entry.relative_change:+.1%}",
            "setup": entry.setup,
            "base model": entry.base_model,
            "source": entry.source,
        }
        for entry in published
    ]
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
