"""Labelled pairs or triplets of anybody's making, measured on one adapter beside its base model.

For sets that take no part in the workflow: those of other people, or a user's own judged pairs. docs/metrics.md has the
metrics.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cachelora.errors import InputError
from cachelora.evaluate import MIN_GROUPS
from cachelora.files import read_records
from cachelora.metrics import bootstrap_weights, interval
from cachelora.models import encode_texts
from cachelora.text import connected_groups, normalise, trivial_key

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

RESAMPLES = 1000
"""Bootstrap resamples behind each interval."""


def read_labelled(path: str | Path) -> pd.DataFrame:
    """Read a file of labelled pairs or of triplets.

    Parameters
    ----------
    path : str or Path
        Records with ``a``, ``b`` and ``label`` (1 if one answer serves both, else 0), or with ``anchor``, ``positive``
        and ``negative``.

    Returns
    -------
    pandas.DataFrame
        A row for each pair: query, other, same_answer, triplet (its number, -1 if the file holds pairs).

    Raises
    ------
    InputError
        If the file or a record cannot be read, or there is no pair of one of the two labels.
    """
    records, rejects = read_records(path)
    if rejects:
        raise InputError(f"{path}, line {rejects[0].line}", rejects[0].reason, "Correct the record")
    rows = []
    for number, record in enumerate(records):
        fields = record.fields
        if {"anchor", "positive", "negative"} <= fields.keys():
            pairs = [(fields["anchor"], fields["positive"], 1), (fields["anchor"], fields["negative"], 0)]
        elif {"a", "b", "label"} <= fields.keys():
            pairs, number = [(fields["a"], fields["b"], fields["label"])], -1
        else:
            raise InputError(
                f"{path}, line {record.line}",
                f"neither a pair nor a triplet (found: {', '.join(map(str, fields))[:80]})",
                "Give the keys a, b and label, or anchor, positive and negative",
            )
        for query, other, label in pairs:
            if not all(isinstance(text, str) and trivial_key(text) for text in (query, other)):
                raise InputError(f"{path}, line {record.line}", "one of its texts is missing", "Give two texts")
            if label not in (0, 1, "0", "1"):
                raise InputError(f"{path}, line {record.line}", f"the label is {label!r}", "Give 0 or 1")
            rows.append((normalise(query), normalise(other), bool(int(label)), number))
    table = pd.DataFrame(rows, columns=["query", "other", "same_answer", "triplet"])
    keys = [
        frozenset((trivial_key(query), trivial_key(other))) for query, other in table[["query", "other"]].to_numpy()
    ]
    labels = table["same_answer"].groupby(keys).nunique()
    if (labels > 1).any():
        shown = " | ".join(sorted(labels.index[labels > 1][0]))[:160]
        raise InputError(str(path), f"a pair stands in it with both labels: {shown}", "Keep the right one")
    if (table["triplet"] < 0).nunique() > 1:
        raise InputError(str(path), "it holds pairs and triplets", "Give a file for each")
    if table["same_answer"].nunique() < 2:
        raise InputError(str(path), "all of its pairs have the same label", "Give pairs of both labels")
    return table


def measure_labelled(pairs: pd.DataFrame, models: Sequence["SentenceTransformer"], seed: int) -> pd.DataFrame:
    """Measure models on labelled pairs.

    Parameters
    ----------
    pairs : pandas.DataFrame
        What :func:`read_labelled` gives.
    models : sequence of SentenceTransformer
        The base model first; changes are from it.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        A row for each metric: metric, then value, change, low and high of each model, its number appended. Intervals
        are 95 % percentile bootstrap intervals of the paired change, over groups of pairs that share a text; not a
        number where there are fewer than :data:`cachelora.evaluate.MIN_GROUPS`. margin: mean cosine of the pairs
        with one answer less that of the others. ap, auc: as ``average_precision_score`` and ``roc_auc_score`` of
        scikit-learn. accuracy: share of the triplets whose positive is nearer; for triplets only.
    """
    similarities = []
    for model in models:
        vectors = encode_texts(model, [*pairs["query"], *pairs["other"]], batch_size=64)
        similarities.append(
            np.array([vectors[q] @ vectors[o] for q, o in zip(pairs["query"], pairs["other"], strict=True)])
        )
    keys = [
        (trivial_key(query), trivial_key(other)) for query, other in zip(pairs["query"], pairs["other"], strict=True)
    ]
    # The pairs of a triplet share their query, so they are in one group.
    groups = connected_groups(keys)
    resamples = RESAMPLES if len(set(groups)) >= MIN_GROUPS else 0
    weights = [np.ones(len(pairs)), *bootstrap_weights(groups, resamples, seed)]
    values = np.array([[_metrics(pairs, similarity, weight) for weight in weights] for similarity in similarities])
    changes = values - values[:1]
    rows = []
    for number, metric in enumerate(("margin", "ap", "auc", "accuracy")):
        if np.isnan(values[0, 0, number]):
            continue
        row = {"metric": metric}
        for model in range(len(models)):
            low, high = interval(changes[model, 1:, number], 0.95) if resamples else (np.nan, np.nan)
            row |= {f"value_{model}": values[model, 0, number], f"change_{model}": changes[model, 0, number]}
            row |= {f"low_{model}": low, f"high_{model}": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _metrics(pairs: pd.DataFrame, similarity: np.ndarray, weights: np.ndarray) -> tuple[float, float, float, float]:
    """Compute margin, AP, AUC and accuracy with weighted pairs; not a number where there is nothing to compute."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    same = pairs["same_answer"].to_numpy()
    if not weights[same].any() or not weights[~same].any():
        return (np.nan,) * 4
    margin = np.average(similarity[same], weights=weights[same]) - np.average(similarity[~same], weights=weights[~same])
    accuracy = np.nan
    if (pairs["triplet"] >= 0).all():
        # The two pairs of a triplet follow one another, and share their query's weight.
        accuracy = np.average(similarity[0::2] > similarity[1::2], weights=weights[0::2])
    ranked = (average_precision_score, roc_auc_score)
    return margin, *(metric(same, similarity, sample_weight=weights) for metric in ranked), accuracy


def labelled_markdown(tables: dict[str, tuple[pd.DataFrame, int]]) -> str:
    """Write the measurements of one adapter for reading.

    Parameters
    ----------
    tables : dict of str to (pandas.DataFrame, int)
        By set: what :func:`measure_labelled` gave for base model and adapter, and the number of pairs.

    Returns
    -------
    str
        A Markdown table: the base model's value and the change with its interval, * where that excludes zero.
    """
    lines = []
    for name, (table, pairs) in tables.items():
        for row in table.itertuples():
            change = f"{row.change_1:+.3f}"
            if not np.isnan(row.low_1):
                star = "*" if row.low_1 > 0 or row.high_1 < 0 else ""
                change += f" [{row.low_1:+.3f}, {row.high_1:+.3f}]{star}"
            lines.append(
                {"set": name, "pairs": pairs, "metric": row.metric, "base": f"{row.value_0:.3f}", "change": change}
            )
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True) + "\n"
