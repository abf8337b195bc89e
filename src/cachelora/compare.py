"""What an adapter changes on a log of one's own: which queries a cache answers before and after.

The log has no labels, so nothing says whether a hit is right. What looks worst is shown first, for a person to judge.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cachelora.errors import ConfigError, InputError
from cachelora.files import read_table, replacing
from cachelora.filter.lexical import changed_name, changed_negation, changed_number, differs
from cachelora.replay import Decisions, replay
from cachelora.schemas import THRESHOLDS
from cachelora.text import on_one_line
from cachelora.thresholds import ALL, ALL_DOMAINS

BUDGET = 0.05
"""The false-hit budget whose threshold is taken where none is given."""
BEGINS, STOPS = "becomes a hit", "stops being a hit"
_SHOWN = 20
_OTHER_WORDS = "other words"
_FORMULA = ("=", "+", "-", "@")


@dataclass(frozen=True)
class Comparison:
    """A log before and after.

    Attributes
    ----------
    queries, distinct : int
        Queries of the log, and different ones among them.
    hits : tuple of (int, int)
        Queries that hit, before and after.
    changed : pandas.DataFrame
        The pairs that become hits or stop being hits: change (:data:`BEGINS` or :data:`STOPS`), query, stored_query
        (the nearest that the cache held), times (how often the log has it so), difference (what the words tell of one:
        number, negation, name, other words, or nothing; :mod:`cachelora.filter.lexical`), cosine_before, cosine_after.
        The worst-looking first.
    """

    queries: int
    distinct: int
    hits: tuple[int, int]
    changed: pd.DataFrame

    @property
    def exact_repeats(self) -> int:
        """Queries that stand in the log before, word for word: any model hits with them."""
        return self.queries - self.distinct


def check_files(log: str | Path, output: str | Path | None) -> None:
    """Refuse, before the work, a file for the result that would replace the log or be no CSV.

    Parameters
    ----------
    log : str or Path
        The log.
    output : str, Path or None
        Where the changed pairs are to go.

    Raises
    ------
    InputError
        If it is the log itself, or has another ending than ``.csv``.
    """
    if output is None:
        return
    if Path(output).suffix.lower() != ".csv":
        raise InputError(f"--output {output}", "the pairs are written as CSV", "Name a file that ends with .csv")
    if Path(output).resolve() == Path(log).resolve():
        raise InputError(f"--output {output}", "that is the log", "Name another file")


def fitted_threshold(adapter: str | Path) -> float:
    """Read the threshold that the workflow chose for an adapter.

    Parameters
    ----------
    adapter : str or Path
        The adapter's folder, ``RESULTS/models/BASE/MODEL``.

    Returns
    -------
    float
        The one for all domains at :data:`BUDGET`.

    Raises
    ------
    ConfigError
        If the adapter lies elsewhere, or no threshold was chosen for it or keeps to the budget.
    DamagedError
        If the file of the thresholds cannot be read.
    """
    folder, remedy = Path(adapter).absolute(), "Give --threshold and --threshold-after"
    found = folder.parent.parent.parent / "thresholds" / folder.parent.name / f"{folder.name}.parquet"
    if folder.parent.parent.name != "models" or not found.is_file():
        raise ConfigError(f"--adapter {adapter}", "the workflow has chosen no threshold for it", remedy)
    table = read_table(found, THRESHOLDS)
    chosen = table[
        (table["test_set"] == ALL_DOMAINS) & (table["fitted_on"] == ALL) & np.isclose(table["budget"], BUDGET)
    ]
    if chosen.empty:
        raise ConfigError(str(found), f"it has no threshold for {BUDGET:.0%} false hits", remedy)
    value = float(chosen["threshold"].iloc[0])
    if math.isnan(value):
        raise ConfigError(str(found), f"no threshold was shown to keep to {BUDGET:.0%} false hits", remedy)
    return value


def compare(
    queries: Sequence[str], vectors: tuple[np.ndarray, np.ndarray], thresholds: tuple[float, float]
) -> Comparison:
    """Send a log through two caches, in its order.

    Parameters
    ----------
    queries : sequence of str, length n
        The log, repetitions included.
    vectors : tuple of two numpy.ndarray, shape (u, d), float32
        Unit vectors of its u distinct queries in the order of their first appearance, before and after.
    thresholds : tuple of two float
        Least cosine of a hit, before and after, in [-1, 1].

    Returns
    -------
    Comparison
        A pair becomes a hit where a query misses before, and after that is answered from the stored query; it stops
        being a hit the other way round. Of the former, those with another number, negation or name come first, then
        those with other words, and among these what the model before finds least alike; of the latter just the other
        way round.

    Raises
    ------
    ModelError
        If a vector is not of numbers.
    """
    texts = [*dict.fromkeys(queries)]
    numbers = {text: number for number, text in enumerate(texts)}
    rows = np.array([numbers[query] for query in queries], dtype=np.int64)
    before, after = (replay(part, rows, threshold) for part, threshold in zip(vectors, thresholds, strict=True))
    begins = _pairs(rows, after, after.hit & ~before.hit).assign(change=BEGINS)
    stops = _pairs(rows, before, before.hit & ~after.hit).assign(change=STOPS)
    changed = pd.concat([begins, stops], ignore_index=True)
    for name, column in (("query", "row"), ("stored_query", "stored")):
        changed[name] = [texts[row] for row in changed[column]]
    for name, part in zip(("cosine_before", "cosine_after"), vectors, strict=True):
        changed[name] = np.einsum("ij,ij->i", part[changed["row"]], part[changed["stored"]]).astype(np.float64)
    changed["difference"] = [_difference(*pair) for pair in zip(changed["query"], changed["stored_query"], strict=True)]
    sign = np.where(changed["change"] == BEGINS, 1, -1)
    changed = changed.assign(
        looks_right=sign * changed["difference"].map({"": 2, _OTHER_WORDS: 1}).fillna(0),
        order=sign * changed["cosine_before"],
    ).sort_values(["change", "looks_right", "order"], kind="stable", ignore_index=True)
    names = ["change", "query", "stored_query", "times", "difference", "cosine_before", "cosine_after"]
    return Comparison(len(queries), len(texts), (int(before.hit.sum()), int(after.hit.sum())), changed[names])


def _difference(query: str, stored: str) -> str:
    """Say what the words of two texts tell of a difference."""
    for name, found in (("number", changed_number), ("negation", changed_negation), ("name", changed_name)):
        if found(query, stored) or found(stored, query):
            return name
    return _OTHER_WORDS if differs(query, stored) else ""


def _pairs(rows: np.ndarray, decisions: Decisions, chosen: np.ndarray) -> pd.DataFrame:
    """Return the distinct pairs of query and nearest stored query, with how often each comes."""
    pairs = np.stack([rows[chosen], decisions.nearest[chosen]], axis=1)
    distinct, times = np.unique(pairs, axis=0, return_counts=True)
    return pd.DataFrame({"row": distinct[:, 0], "stored": distinct[:, 1], "times": times})


def comparison_tables(
    comparison: Comparison, thresholds: tuple[float, float], notes: Sequence[str]
) -> Iterator[tuple[str, list[str], list[list[object]]]]:
    """Make the tables for the terminal.

    Parameters
    ----------
    comparison : Comparison
        What :func:`compare` gives.
    thresholds : tuple of two float
        Least cosine of a hit, before and after.
    notes : sequence of two str
        Where each threshold comes from.

    Yields
    ------
    tuple of (str, list of str, list of list)
        Title, head and rows: the hits, the pairs that become hits, those that stop; up to 20 pairs each.
    """
    queries, repeats = comparison.queries, comparison.exact_repeats
    rows = [
        [name, f"{threshold:.4f}", note, f"{hits:,}", f"{hits / queries:.1%}", f"{hits - repeats:,}"]
        for name, threshold, note, hits in zip(("before", "after"), thresholds, notes, comparison.hits, strict=True)
    ]
    title = f"{queries:,} queries, {comparison.distinct:,} distinct, {repeats:,} exact repeats"
    head = ["", "threshold", "which is", "hits", "hit ratio", "beyond exact repeats"]
    yield f"{title}. Hits are right ones and false ones: the log does not tell them apart.", head, rows
    head = ["query", "stored query", "times", "difference", "cosine before", "after"]
    for change, what, worst in (
        (BEGINS, "become hits", "with another number, negation or name, and among these the least alike"),
        (STOPS, "stop being hits", "without a difference in their words, and among these the most alike"),
    ):
        pairs = comparison.changed[comparison.changed["change"] == change]
        rows = [
            [row.query, row.stored_query, row.times, row.difference]
            + [f"{cosine:.3f}" for cosine in (row.cosine_before, row.cosine_after)]
            for row in pairs.head(_SHOWN).itertuples()
        ]
        shown = f", {len(rows)} of them here" if len(rows) < len(pairs) else ""
        order = f"; first those {worst} before" if rows else ""
        yield f"Pairs that {what}: {len(pairs):,}{shown}{order}", head, rows


def write_changed(path: str | Path, changed: pd.DataFrame) -> None:
    """Write the changed pairs as CSV.

    Parameters
    ----------
    path : str or Path
        The file.
    changed : pandas.DataFrame
        As in :class:`Comparison`. A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    texts = {
        name: [f"'{text}" if text.startswith(_FORMULA) else text for text in map(on_one_line, changed[name])]
        for name in ("query", "stored_query")
    }
    with replacing(path) as temporary:
        changed.assign(**texts).to_csv(temporary, index=False, float_format="%.6f")
