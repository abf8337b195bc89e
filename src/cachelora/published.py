"""What the seeds published, beside what was measured here."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cachelora.errors import ConfigError
from cachelora.evaluate import ALL_KINDS

Cosine = Annotated[float, Field(ge=-1, le=1)]


class Published(BaseModel):
    """A margin that the seeds published, with our verdict.

    Attributes
    ----------
    domain : str
        The domain, or ``average``.
    source : str
        The document.
    setup : str
        What was trained and tested on, in a few words.
    base_model : str
        Its base model.
    n : int or None
        Number of test triplets, where the document says it.
    base_margin, margin : float or None
        Before and after, where the document gives them, in [-2, 2].
    relative_change : float
        The published gain, as a share of the base margin.
    base_positive_similarity, base_negative_similarity, positive_similarity, negative_similarity : float or None
        The means behind the margins, where the document gives them.
    measured_on : str or None
        The test set of ours that is the document's.
    measured_model : str or None
        The model of ours of the same making; given with ``measured_on``.
    verdict : {"reproduced", "contradicted", "not reproducible"}
        Contradicted by a measurement, or by another of the documents about the same thing.
    because : str
        Why, in a sentence.
    """

    model_config = ConfigDict(extra="forbid")

    domain: str
    source: str
    setup: str
    base_model: str
    n: Annotated[int, Field(ge=1)] | None = None
    base_margin: float | None = None
    margin: float | None = None
    relative_change: float
    base_positive_similarity: Cosine | None = None
    base_negative_similarity: Cosine | None = None
    positive_similarity: Cosine | None = None
    negative_similarity: Cosine | None = None
    measured_on: str | None = None
    measured_model: str | None = None
    verdict: Literal["reproduced", "contradicted", "not reproducible"]
    because: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _check_measured(self) -> "Published":
        """Refuse a set without a model, and a model without a set."""
        if (self.measured_on is None) != (self.measured_model is None):
            raise ValueError("measured_on and measured_model are given together")
        return self


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


def published_table(published: Sequence[Published], table: pd.DataFrame) -> pd.DataFrame:
    """Put the published margins beside ours.

    Parameters
    ----------
    published : sequence of Published
        The seeds' numbers.
    table : pandas.DataFrame
        What was measured: base_model, model, test_set, kind, metric, n, value, low, high, change, change_low and
        change_high.

    Returns
    -------
    pandas.DataFrame
        Texts to be read, a row for each published margin; where the table holds the document's own test set, a row for
        each base model that was measured on it. Ours have their interval, and a change is marked * where its interval
        excludes zero; where a cell is empty, there is nothing to show.
    """
    margins = table[(table["kind"] == ALL_KINDS) & (table["metric"] == "margin")]
    rows = []
    for entry in published:
        theirs = {
            "domain": entry.domain,
            "document": entry.source,
            "setup": entry.setup,
            "base model": entry.base_model,
            "n": "" if entry.n is None else str(entry.n),
            "published base margin": _shown(entry.base_margin),
            "published margin": _shown(entry.margin),
            "published change": f"{entry.relative_change:+.1%}",
            "published similarities": _similarities(entry),
        }
        verdict = {"verdict": entry.verdict, "because": entry.because}
        on_set = margins[margins["test_set"] == entry.measured_on]
        for base_model, found in on_set.groupby("base_model", sort=False):
            rows.append(theirs | _ours(entry, str(base_model), found) | verdict)
        if on_set.empty:
            rows.append(theirs | dict.fromkeys(_OURS, "") | verdict)
    return pd.DataFrame(rows)


_OURS = ("measured base margin", "measured margin", "measured change", "measured n", "measured on")


def _ours(entry: Published, base_model: str, found: pd.DataFrame) -> dict[str, str]:
    """Show what was measured on one base model."""
    rows = {row.model: row for row in found.itertuples()}
    base, model = rows.get("base"), rows.get(entry.measured_model)
    return {
        "measured base margin": "" if base is None else _with_interval(base.value, base.low, base.high, ".4f"),
        "measured margin": "" if model is None else _with_interval(model.value, model.low, model.high, ".4f"),
        "measured change": "" if model is None else _change(model.change, model.change_low, model.change_high),
        "measured n": str(found["n"].iloc[0]),
        "measured on": ", ".join((entry.measured_on, base_model, *([] if model is None else [model.model]))),
    }


def _shown(margin: float | None) -> str:
    """Show a published margin."""
    return "" if margin is None else f"{margin:.4f}"


def _similarities(entry: Published) -> str:
    """Show the means behind the margins, before and after."""
    before = _both(entry.base_positive_similarity, entry.base_negative_similarity)
    after = _both(entry.positive_similarity, entry.negative_similarity)
    return " → ".join(filter(None, (before, after)))


def _both(positive: float | None, negative: float | None) -> str:
    """Show the means of the positives and the negatives."""
    parts: Iterable[tuple[str, float | None]] = (("positive", positive), ("negative", negative))
    return ", ".join(f"{name} {value:.4f}" for name, value in parts if value is not None)


def _change(change: float, low: float, high: float) -> str:
    """Show a change with its interval, if it has one, and a star where that excludes zero."""
    return _with_interval(change, low, high, "+.4f") + ("*" if low > 0 or high < 0 else "")


def _with_interval(value: float, low: float, high: float, form: str) -> str:
    """Show a value with its interval, if it has one."""
    return f"{value:{form}}" + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")
