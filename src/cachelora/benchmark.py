"""Stage `benchmark`: one table of all models on all test sets, and what it says, in sections for reading."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cachelora.config import Evaluate
from cachelora.evaluate import ALL_KINDS, LOOK_ALIKES
from cachelora.files import read_json, read_table
from cachelora.published import Published, published_table, read_published
from cachelora.schemas import THRESHOLDS
from cachelora.thresholds import ALL, ALL_DOMAINS, FIXED, OWN, verdict_on

BASE = "base"
MEASURED = "measured"
REPLAY = "Replay"
_COLUMNS = (
    ("margin", "margin"),
    ("ap", "AP"),
    ("accuracy", "accuracy"),
    ("recall_at_budget", "recall"),
    ("hit_ratio_at_budget", "hit ratio"),
)
_MORE_COLUMNS = (
    ("positive_similarity", "mean positive"),
    ("negative_similarity", "mean negative"),
    ("roc_auc", "ROC-AUC"),
    ("best_f1", "best F1"),
    ("best_f05", "best F0.5"),
    ("p_chr_auc", "P-CHR AUC"),
    ("calibration_retention", "CRR"),
    ("overlap", "overlap"),
)
_OVERVIEWS = (
    (ALL_KINDS, "margin", "Margin"),
    (ALL_KINDS, "ap", "AP"),
    (LOOK_ALIKES, "accuracy", "Accuracy on look-alikes (every kind of negative but topic)"),
    ("topic", "margin", "Margin on easy negatives (kind topic)"),
)
_TESTED = ("margin", "ap", "accuracy")
"""Metrics whose changes are tested: the others follow from these, or are read off the set's own best threshold."""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes
    ----------
    title : str
        Its heading.
    text : tuple of str
        Paragraphs above the table.
    table : pandas.DataFrame or None
        Strings, ready to be shown.
    """

    title: str
    text: tuple[str, ...] = ()
    table: pd.DataFrame | None = None


@dataclass(frozen=True)
class Findings:
    """All that the report is about.

    Attributes
    ----------
    table : pandas.DataFrame
        What :func:`benchmark_table` gives.
    published : sequence of Published
        The seeds' numbers.
    thresholds : mapping of (str, str) to pandas.DataFrame
        By base model and model, in the columns of :data:`cachelora.schemas.THRESHOLDS`.
    replays : mapping of (str, str) to dict
        By base model and model, what the stage `replay` writes.
    deployed : str
        The model that is put into service.
    confidence : float
        Coverage of the intervals.
    false_hit_budget : float
        Budget of recall and hit ratio.
    threshold_confidence : float
        With that confidence a threshold keeps to its budget.
    repeats : mapping of str to sequence of str
        Models that differ in nothing but seeds, by the first one's id.
    """

    table: pd.DataFrame
    published: Sequence[Published]
    deployed: str
    confidence: float
    false_hit_budget: float
    threshold_confidence: float = 0.95
    thresholds: Mapping[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    replays: Mapping[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    repeats: Mapping[str, Sequence[str]] = field(default_factory=dict)


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
        A row for each base model, model, test set, kind and metric, with value, change, intervals, p and p_holm;
        ``source`` is "measured", or "published: " and the document. p_holm is corrected over the changes of margin, AP
        and accuracy of all models, sets and kinds, and missing elsewhere.
    """
    rows = [
        {"source": MEASURED, "base_model": evaluation["base_model"], "model": evaluation["model"], **result}
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
    table = pd.DataFrame(rows)
    for name in ("value", "low", "high", "change", "change_low", "change_high", "p", "relative_change"):
        table[name] = table[name].astype("float64")
    tested = table["metric"].isin(_TESTED) & table["p"].notna()
    return table.assign(p_holm=pd.Series(holm(table.loc[tested, "p"].to_numpy()), index=table.index[tested]))


def read_findings(
    evaluations: Sequence[str | Path],
    thresholds: Sequence[str | Path],
    replays: Sequence[str | Path],
    published: str | Path,
    settings: Evaluate,
    threshold_confidence: float,
    deployed: str,
    repeats: Mapping[str, Sequence[str]],
) -> Findings:
    """Read what the stages before have found.

    Parameters
    ----------
    evaluations, replays : sequence of str or Path
        What the stages `evaluate` and `replay` wrote.
    thresholds : sequence of str or Path
        What the stage `thresholds` wrote, in folders of the base model's name.
    published : str or Path
        The published numbers.
    settings : Evaluate
        Coverage and budget.
    threshold_confidence : float
        As in :class:`Findings`.
    deployed : str
        The model that is put into service.
    repeats : mapping of str to sequence of str
        Models that differ in nothing but seeds, by the first one's id.

    Returns
    -------
    Findings
        All of it.

    Raises
    ------
    DamagedError
        As :func:`cachelora.files.read_table` and :func:`cachelora.files.read_json`.
    ConfigError
        As :func:`cachelora.published.read_published`.
    """
    entries, streams = read_published(published), [read_json(path) for path in replays]
    return Findings(
        table=benchmark_table([read_json(path) for path in evaluations], entries).assign(
            confidence=settings.confidence
        ),
        published=entries,
        deployed=deployed,
        confidence=settings.confidence,
        false_hit_budget=settings.false_hit_budget,
        threshold_confidence=threshold_confidence,
        thresholds={(Path(path).parent.name, Path(path).stem): read_table(path, THRESHOLDS) for path in thresholds},
        replays={(replay["base_model"], replay["model"]): replay for replay in streams},
        repeats=repeats,
    )


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p-values for their number, so that the chance of one false discovery among them stays what it says.

    Parameters
    ----------
    p : numpy.ndarray, shape (n,)
        The p-values.

    Returns
    -------
    numpy.ndarray, shape (n,)
        Corrected (Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure").
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def report_sections(findings: Findings) -> list[Section]:
    """Write what was found, in the order in which it is read.

    Parameters
    ----------
    findings : Findings
        All of it.

    Returns
    -------
    list of Section
        What to take, overviews, thresholds, replay, models of several seeds, a section for each base model and test
        set, changes by kind, and the published margins beside ours.
    """
    table = findings.table[findings.table["source"] == MEASURED]
    sections = [Section("What to take", tuple(recommendation(findings)))]
    for base, rows in table.groupby("base_model", sort=False):
        sections += overviews(rows, findings.confidence)
        for model in (findings.deployed, BASE):
            if (base, model) in findings.thresholds:
                sections.append(_threshold_section(findings, base, model))
        sections += _replay_sections(findings, base)
        if findings.repeats:
            text = "Mean, lowest and highest of the changes from the base model, by what was measured."
            sections.append(Section(f"Over seeds, base model {base}", (text,), _seed_table(rows, findings.repeats)))
    overall = table[table["kind"] == ALL_KINDS]
    for (base, test_set), rows in overall.groupby(["base_model", "test_set"], sort=False):
        n = int(rows["n"].iloc[0])
        pairs = "accuracy" not in set(rows["metric"])
        size = f"{n} {'pair' if pairs else 'triplet'}{'' if n == 1 else 's'}"
        title = f"{test_set} ({size}, {rows['test_version'].iloc[0]}), base model {base}"
        sections += [Section(title, (), _model_table(rows, findings.confidence))]
        sections += [Section(f"More of {test_set}, base model {base}", (), _more_table(rows))]
    for base, rows in table.groupby("base_model", sort=False):
        for metric, title in (("margin", "margin"), ("ap", "AP")):
            title = f"Change of the {title} by kind of negative, base model {base}"
            sections.append(Section(title, (), _kind_table(rows, metric, findings.confidence)))
    if findings.published:
        sections.append(
            Section(
                "Published against measured",
                (
                    "Margins that the seeds of this project published, on other test sets and partly other base "
                    "models, without intervals. Where a set of this table is the one that they measured on, our "
                    "figure stands beside theirs.",
                ),
                published_table(findings.published, table),
            )
        )
    return sections


def explanation(findings: Findings) -> str:
    """Say how to read the tables.

    Parameters
    ----------
    findings : Findings
        The settings behind them.

    Returns
    -------
    str
        A paragraph.
    """
    tested = int(findings.table["p_holm"].notna().sum())
    return (
        "margin = mean cos(anchor, positive) - mean cos(anchor, negative). Each value stands before its "
        f"{100 * findings.confidence:g} % bootstrap interval over groups; Δ is the paired change from the base model, "
        f"* where it is not by chance (p < {1 - findings.confidence:.2g}, Holm-corrected over the {tested} changes of "
        "margin, AP and accuracy that were tested); sets of fewer than ten groups have no intervals. Recall and hit "
        f"ratio: at the lowest threshold at which no more than {100 * findings.false_hit_budget:g} % of the set's "
        "negatives hit, read off the set itself. Relative changes are given only where the base margin's interval lies "
        "above zero. All definitions: docs/metrics.md."
    )


def recommendation(findings: Findings) -> list[str]:
    """Say which model to take, at which threshold, and what will still go wrong.

    Parameters
    ----------
    findings : Findings
        All of it.

    Returns
    -------
    list of str
        Paragraphs.
    """
    table = findings.table[findings.table["source"] == MEASURED]
    found = []
    for base, rows in table.groupby("base_model", sort=False):
        of_domains = rows
        if (base, findings.deployed) in findings.thresholds:
            tried = findings.thresholds[base, findings.deployed]["test_set"].unique()
            of_domains = rows[rows["test_set"].isin(tried)]
        found += [
            _take(of_domains, base, findings),
            _elsewhere(rows.drop(of_domains.index), base, findings),
            _threshold_advice(findings, base),
            _replay_advice(findings, base),
            _what_goes_wrong(of_domains, base, findings),
        ]
    return [paragraph for paragraph in found if paragraph]


def _take(rows: pd.DataFrame, base: str, findings: Findings) -> str:
    """Say what the deployed model is worth beside the base model and the others."""
    model = findings.deployed
    aps = rows[(rows["kind"] == ALL_KINDS) & (rows["metric"] == "ap")]
    mine = aps[aps["model"] == model]
    if mine.empty:
        return ""
    if mine["p_holm"].isna().all():
        return f"On {base}, there is too little to test `{model}` on: no test set has ten groups, or nothing changed."
    better, worse = (int((_sure(mine, findings.confidence) & (sign * mine["change"] > 0)).sum()) for sign in (1, -1))
    if better and not worse:
        said = f"On {base}, take `{model}`: "
    elif worse:
        said = f"On {base}, `{model}` is what the configuration deploys; look twice: "
    else:
        said = f"On {base}, nothing speaks for `{model}`, which the configuration deploys: "
    said += (
        f"its AP is significantly higher than the base model's on {better} of {len(mine)} test sets, significantly "
        f"lower on {worse} (changes from {mine['change'].min():+.3f} to {mine['change'].max():+.3f})."
    )
    means = aps.groupby("model", sort=False)["value"].mean()
    ahead = [name for name in means.index if name not in (model, BASE) and means[name] > means[model]]
    if ahead:
        said += (
            f" {_listed(ahead)} {'has' if len(ahead) == 1 else 'have'} a higher mean AP over these sets; choose "
            "between models on the validation split, not here."
        )
    else:
        said += " No other model has a higher mean AP over these sets."
    return said


def _elsewhere(rows: pd.DataFrame, base: str, findings: Findings) -> str:
    """Say where the deployed model is worse on sets that belong to no domain."""
    mine = rows[
        (rows["model"] == findings.deployed) & (rows["kind"] == ALL_KINDS) & rows["metric"].isin(["margin", "ap"])
    ]
    worse = mine[_sure(mine, findings.confidence) & (mine["change"] < 0)]
    if worse.empty:
        return ""
    names = {"margin": "margin", "ap": "AP"}
    shown = [f"{row.test_set} ({names[row.metric]} {row.change:+.3f})" for row in worse.itertuples()]
    return (
        f"Look twice: on sets of other people's making `{findings.deployed}` on {base} is significantly worse than the "
        f"base model, {_listed(shown)}."
    )


def _threshold_advice(findings: Findings, base: str) -> str:
    """Say at which threshold the deployed model keeps to the largest budget, and what it leaves."""
    table = findings.thresholds.get((base, findings.deployed))
    if table is None:
        return ""
    everywhere = table[table["test_set"] == ALL_DOMAINS]
    chosen = everywhere[everywhere["fitted_on"] == ALL].sort_values("budget").iloc[-1]
    fixed = everywhere[everywhere["fitted_on"] == FIXED].iloc[0]
    if math.isnan(chosen["threshold"]):
        return f"Of no threshold can be shown that no more than {_percent(chosen['budget'])} of look-alikes hit at it."
    return (
        f"At the threshold {chosen['threshold']:.4f} no more than {_percent(chosen['budget'])} of look-alikes hit, "
        f"with {_percent(findings.threshold_confidence)} confidence; on the test part "
        f"{_percent(chosen['false_hit_rate'])} did, and {_percent(chosen['recall'])} of the paraphrases. At "
        f"{fixed['threshold']:g}, which stands for a threshold that nobody chose, "
        f"{_percent(fixed['false_hit_rate'])} of the look-alikes hit and {_percent(fixed['recall'])} of the "
        "paraphrases. Look-alikes are rarer among real queries than in these sets: see the replay, and choose a "
        "threshold on pairs of your own log with `cachelora threshold`."
    )


def _replay_advice(findings: Findings, base: str) -> str:
    """Say what the deployed model saves in the replay with no more false hits than the base model."""
    before, after = (findings.replays.get((base, model)) for model in (BASE, findings.deployed))
    if not before or not after:
        return ""
    usual = next(found for found in before["thresholds"] if found["budget"] is None)
    # Both at the best of their grid: one threshold means another thing to each model.
    best = [
        max(
            (point for point in replay["frontier"] if point["false_hit_share"] <= usual["false_hit_share"]),
            key=lambda point: point["calls_saved"],
            default=None,
        )
        for replay in (before, after)
    ]
    if None in best:
        return ""
    saved = [f"{_percent(point['calls_saved'])} of the calls (at {point['threshold']:.2f})" for point in best]
    return (
        f"In the replay, the base model at {usual['threshold']:g} answers {_percent(usual['false_hit_share'])} of the "
        f"queries falsely. With no more false hits than that it saves up to {saved[0]}, and `{findings.deployed}` "
        f"{saved[1]}, each at the best threshold of a grid on this one stream; a cache that is never wrong would save "
        f"{_percent(after['stream']['best_hit_ratio'])}, one that knows nothing but the same words "
        f"{_percent(after['frontier'][-1]['calls_saved'])}, and a threshold for a budget of look-alikes may be no "
        f"better than that. So begin at {best[1]['threshold']:.2f} if so many false hits can be borne, higher if not, "
        "and check it on your own log."
    )


def _what_goes_wrong(rows: pd.DataFrame, base: str, findings: Findings) -> str:
    """Say on which kinds of negatives the deployed model is worst, and where it is worse than the base model."""
    kinds = rows[(rows["model"] == findings.deployed) & (rows["metric"] == "ap")]
    kinds = kinds[~kinds["kind"].isin([ALL_KINDS, LOOK_ALIKES])]
    by_kind = kinds[kinds["kind"] != "topic"].groupby("kind")["value"].mean().sort_values()
    if by_kind.empty:
        return ""
    worst = [f"{kind} (mean AP {value:.2f})" for kind, value in by_kind.head(2).items()]
    said = (
        f"What will still go wrong with `{findings.deployed}` on {base}: of the look-alikes, those of "
        f"{_listed(worst)} are told apart worst."
    )
    lost = kinds[_sure(kinds, findings.confidence) & (kinds["change"] < 0)]
    if len(lost):
        shown = [f"{row.kind} of {row.test_set} ({row.change:+.2f})" for row in lost.itertuples()]
        said += f" It is significantly worse than the base model on {_listed(shown)}."
    fell = kinds[kinds["change_high"] < 0].drop(lost.index)
    if len(fell):
        shown = [f"{row.kind} of {row.test_set} ({row.change:+.2f})" for row in fell.itertuples()]
        said += f" It is probably worse (uncorrected interval below zero) on {_listed(shown)}."
    easy = rows[(rows["model"] == findings.deployed) & (rows["metric"] == "margin") & (rows["kind"] == "topic")]
    nearer = easy[_sure(easy, findings.confidence) & (easy["change"] < 0)]
    if len(nearer):
        shown = [f"{row.test_set} ({row.change:+.2f})" for row in nearer.itertuples()]
        said += f" Easy negatives (topic) come nearer: their margin falls significantly in {_listed(shown)}."
    return said


def _sure(rows: pd.DataFrame, confidence: float) -> pd.Series:
    """Say of each change whether it is not by chance."""
    return rows["p_holm"] < 1 - confidence


def _listed(names: Sequence[str]) -> str:
    """Put names into a sentence."""
    names = [*names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _percent(share: float) -> str:
    """Show a share as a percentage of three digits."""
    return "n/a" if math.isnan(share) else f"{100 * share:.3g} %"


def overviews(rows: pd.DataFrame, confidence: float) -> list[Section]:
    """Make the tables of single metrics: a row a model, a column a test set.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of one base model in :func:`benchmark_table`.
    confidence : float
        Coverage of the intervals.

    Returns
    -------
    list of Section
        The base model's values and the others' changes.
    """
    base, sections = rows["base_model"].iloc[0], []
    for kind, metric, title in _OVERVIEWS:
        chosen = rows[(rows["kind"] == kind) & (rows["metric"] == metric)]
        if chosen.empty:
            continue
        cells = [_value(row) if row["model"] == BASE else _change(row, confidence) for _, row in chosen.iterrows()]
        wide = chosen.assign(cell=cells).pivot(index="model", columns="test_set", values="cell")
        wide = wide.loc[list(dict.fromkeys(chosen["model"])), list(dict.fromkeys(chosen["test_set"]))]
        wide.columns.name = None
        sections.append(Section(f"{title} by test set, base model {base}", (), wide.fillna("").reset_index()))
    return sections


def benchmark_markdown(findings: Findings) -> str:
    """Write the sections as Markdown.

    Parameters
    ----------
    findings : Findings
        All of it.

    Returns
    -------
    str
        The page.
    """
    parts = ["# Benchmark", explanation(findings)]
    for section in report_sections(findings):
        parts += [f"## {section.title}", *section.text]
        if section.table is not None:
            parts.append(section.table.to_markdown(index=False, disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def _threshold_section(findings: Findings, base: str, model: str) -> Section:
    """Make the table of a model's thresholds."""
    lines = []
    for row in findings.thresholds[base, model].itertuples():
        if row.fitted_on == FIXED:
            chosen = "fixed"
        else:
            chosen = f"{_percent(row.budget)}, {'its own' if row.fitted_on == OWN else 'all'}"
        line = {"test set": row.test_set, "budget, chosen on": chosen}
        if math.isnan(row.threshold):
            shown = f"none: {row.calibration_effective:.0f} negatives are too few, or hit at any"
            lines.append(line | {"threshold": shown, "recall": "", "hit ratio": "", "false-hit rate": "", "budget": ""})
            continue
        line["threshold"] = f"{row.threshold:.4f}"
        for name, title in (("recall", "recall"), ("hit_ratio", "hit ratio"), ("false_hit_rate", "false-hit rate")):
            low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
            line[title] = f"{getattr(row, name):.3f} [{low:.3f}, {high:.3f}]"
        if row.fitted_on != FIXED:
            line["budget"] = verdict_on(row.false_hit_rate_low, row.false_hit_rate_high, row.budget)
        lines.append(line)
    return Section(
        f"Thresholds of {model} for a false-hit budget, base model {base}",
        (
            "Chosen on the calibration part of the test sets, the domain's own or all of them, tried on the test part: "
            f"the lowest at which, with {_percent(findings.threshold_confidence)} confidence, no more than the budget "
            "of the look-alikes hit. On the test part it is `kept` or `broken` where the whole interval of the "
            "false-hit rate lies within the budget or above it.",
        ),
        pd.DataFrame(lines).fillna(""),
    )


def _replay_sections(findings: Findings, base: str) -> list[Section]:
    """Make the table of the replays, the base model's beside the deployed one's."""
    replays = [(model, findings.replays.get((base, model))) for model in (BASE, findings.deployed)]
    lines, paragraphs = [], []
    for model, replay in replays:
        for found in replay["thresholds"] if replay else []:
            line = {"model": model, "threshold": f"{found['label']} ({found['threshold']:.4f})"}
            for name, title in (
                ("hit_ratio", "hit ratio"),
                ("calls_saved", "calls saved"),
                ("false_hit_share", "false hits"),
                ("false_hits_of_hits", "false hits among hits"),
            ):
                line[title] = "n/a" if found[name] is None else f"{found[name]:.3f}"
                if found[name] is not None and found[f"{name}_low"] is not None:
                    line[title] += f" [{found[f'{name}_low']:.3f}, {found[f'{name}_high']:.3f}]"
            lines.append(line)
        if replay and not paragraphs:
            stream = replay["stream"]
            forms = ", ".join(f"{number} {form}" for form, number in stream["by_form"].items())
            paragraphs.append(
                f"{stream['queries']} queries ({forms}) about {stream['intents']} things, drawn from the test part "
                "with Zipf popularity, through a growing index at the thresholds that were chosen on the calibration "
                f"part. A cache that is never wrong would save {stream['best_hit_ratio']:.3f} of the calls. The test "
                "sets are made of look-alikes, so queries of a log resemble one another less than these."
            )
    return [Section(f"{REPLAY}, base model {base}", tuple(paragraphs), pd.DataFrame(lines))] if lines else []


def _seed_table(rows: pd.DataFrame, repeats: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Make the table of models of several seeds: a row for each of them and metric, a column a test set."""
    lines = []
    for kind, metric, title in _OVERVIEWS:
        measured = rows[(rows["kind"] == kind) & (rows["metric"] == metric)]
        for first, names in repeats.items():
            line = {"measured": title, "model": first, "seeds": str(len(names))}
            for test_set, found in measured[measured["model"].isin(names)].groupby("test_set", sort=False)["change"]:
                line[test_set] = f"{found.mean():+.3f} [{found.min():+.3f}, {found.max():+.3f}]"
            lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _model_table(rows: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Make the table of one test set: a row a model."""
    lines = []
    for model, metrics in rows.groupby("model", sort=False):
        by_name = metrics.set_index("metric")
        line = {"model": model}
        for metric, title in _COLUMNS:
            if metric not in by_name.index:
                continue
            row = by_name.loc[metric]
            line[title] = _value(row)
            if metric in _TESTED:
                line[f"Δ {title}"] = "" if model == BASE else _change(row, confidence)
        relative = by_name.loc["margin", "relative_change"]
        line["Δ margin %"] = "" if model == BASE else "n/a" if pd.isna(relative) else f"{relative:+.0%}"
        lines.append(line)
    return pd.DataFrame(lines)


def _more_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the table of the further metrics of one test set: a row a model."""
    lines = []
    for model, metrics in rows.groupby("model", sort=False):
        by_name = metrics.set_index("metric")
        shown = {title: _value(by_name.loc[metric]) for metric, title in _MORE_COLUMNS if metric in by_name.index}
        lines.append({"model": model} | shown)
    return pd.DataFrame(lines)


def _kind_table(rows: pd.DataFrame, metric: str, confidence: float) -> pd.DataFrame:
    """Make the table of changes by kind: a row a test set and model."""
    together = rows["kind"].isin((ALL_KINDS, LOOK_ALIKES))
    chosen = rows[(rows["metric"] == metric) & (rows["model"] != BASE) & ~together]
    chosen = chosen.assign(shown=[_change(row, confidence) for _, row in chosen.iterrows()])
    wide = chosen.pivot(index=["test_set", "model"], columns="kind", values="shown")
    order = chosen[["test_set", "model"]].drop_duplicates().itertuples(index=False, name=None)
    wide = wide.loc[sorted(order), list(dict.fromkeys(chosen["kind"]))].fillna("").reset_index()
    wide.columns.name = None
    return wide.rename(columns={"test_set": "test set"})


def _value(row: pd.Series) -> str:
    """Show a value with its interval, if it has one."""
    return f"{row['value']:.3f}" + ("" if pd.isna(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]")


def _change(row: pd.Series, confidence: float) -> str:
    """Show a change with its interval, if it has one, and a star where it is not by chance."""
    if pd.isna(row["change_low"]):
        return f"{row['change']:+.3f}"
    star = "*" if row["p_holm"] < 1 - confidence else ""
    return f"{row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}]{star}"
