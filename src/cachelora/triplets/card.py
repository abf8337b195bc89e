"""The data card: what became of everything that was written for a domain's queries, and why."""

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

import pandas as pd

from cachelora.filter.reasons import REASONS
from cachelora.schemas import KINDS, LOOK_ALIKE_KINDS, MINED, PARAPHRASE, role_of
from cachelora.text import digest, on_one_line
from cachelora.triplets import JUDGE

_REASONS = {**REASONS, JUDGE: "the judge says otherwise"}
_EXAMPLES = 20
_BINS = [number / 20 for number in range(-4, 21)]
# Shares from which on the card warns: what is more than that in the shipped corpora or a good LLM's output is rare.
_MOST_DROPPED = {PARAPHRASE: 0.3, "negative": 0.4}
_MOST_BY_ONE = 0.2
_MOST_GROUPS_LOST = 0.25
_LEAST_OF_A_KIND = 0.05
_MOST_UNJUDGED = 0.1
_MOST_ALIKE = 0.9


@dataclass(frozen=True)
class DataCard:
    """The data card of a domain.

    Parameters
    ----------
    domain : str
        The domain.
    queries : pandas.DataFrame
        All its queries, in the columns of :data:`cachelora.schemas.QUERIES`.
    texts : pandas.DataFrame
        What was written for those that are not held out for the test, in the columns of
        :data:`cachelora.schemas.FILTERED`, the judge's reasons included.
    triplets : pandas.DataFrame
        What became of it, in the columns of :data:`cachelora.schemas.TRIPLETS`.
    dropped : Counter
        Queries and groups that were dropped, by reason.
    judged : Counter or None
        Verdicts of the judge, by what they say; None without a judge.
    """

    domain: str
    queries: pd.DataFrame
    texts: pd.DataFrame
    triplets: pd.DataFrame
    dropped: Counter[str]
    judged: Counter[str] | None = None

    @cached_property
    def _roles(self) -> pd.Series:
        """Whether each text is a paraphrase or a negative."""
        return self.texts["kind"].map(role_of).astype("str")

    @cached_property
    def _kept(self) -> pd.Series:
        """Whether each text is kept."""
        return self.texts["reasons"].map(len).eq(0).astype(bool)

    @property
    def funnel(self) -> list[tuple[str, int]]:
        """How many there are at each step, from the log to the rows."""
        held_out = self.queries["split"] == "test"
        used, texts = self.queries[~held_out], self.texts
        groups = self.triplets.drop_duplicates("group")
        by_filters = texts["reasons"].map(lambda reasons: any(reason != JUDGE for reason in reasons)).astype(bool)
        steps = [
            ("queries, repetitions included", int(self.queries["count"].sum())),
            ("groups of like spellings", self.queries["group"].nunique()),
            ("groups held out for the test", self.queries.loc[held_out, "group"].nunique()),
            ("groups to train and validate on", used["group"].nunique()),
        ]
        for role in (PARAPHRASE, "negative"):
            mine = self._roles == role
            for source, name in (("llm", "by the LLM"), ("rule", "by rules"), ("mined", "mined")):
                number = int((mine & (texts["source"] == source)).sum())
                if number or source == "llm":
                    steps.append((f"{role}s {name}", number))
            steps.append((f"{role}s that the filters keep", int((mine & ~by_filters).sum())))
            if self.judged is not None:
                steps.append((f"{role}s that the judge keeps too", int((mine & self._kept).sum())))
        for split, purpose in (("train", "training"), ("validation", "validation")):
            steps.append((f"groups kept for {purpose}", int((groups["split"] == split).sum())))
            steps.append((f"triplet rows for {purpose}", int((self.triplets["split"] == split).sum())))
        return steps

    @property
    def reasons(self) -> list[tuple[str, str, int, int]]:
        """Reason, role, how many texts it drops, and how many of them no other drops."""
        rows = []
        for name, meaning in _REASONS.items():
            for role in (PARAPHRASE, "negative"):
                found = self.texts.loc[self._roles == role, "reasons"]
                dropped = int(found.map(lambda reasons, name=name: name in reasons).sum())
                alone = int(found.map(lambda reasons, name=name: list(reasons) == [name]).sum())
                if dropped:
                    rows.append((f"{name}: {meaning}", role, dropped, alone))
        return rows

    @property
    def kinds(self) -> list[tuple[str, int, int]]:
        """Kind of text, how many were there, and how many are kept."""
        rows = []
        for kind in (PARAPHRASE, *KINDS, MINED):
            mine = self.texts["kind"] == kind
            if mine.any() or kind in LOOK_ALIKE_KINDS:
                rows.append((kind, int(mine.sum()), int((mine & self._kept).sum())))
        return rows

    @property
    def warnings(self) -> list[str]:
        """What looks wrong."""
        found = []
        for role in (PARAPHRASE, "negative"):
            mine = self._roles == role
            total, lost = int(mine.sum()), int((mine & ~self._kept).sum())
            if total and lost > _MOST_DROPPED[role] * total:
                found.append(f"{lost} of {total} {role}s are dropped: use a better LLM, or see which filter it is")
            for reason, of, dropped, _ in self.reasons:
                if of == role and dropped > _MOST_BY_ONE * total:
                    found.append(f"one reason drops {dropped} of {total} {role}s ({reason}): look at the examples")
        groups = self.queries.loc[self.queries["split"] != "test", "group"].nunique()
        lost = groups - self.triplets["group"].nunique()
        if groups and lost > _MOST_GROUPS_LOST * groups:
            found.append(f"{lost} of {groups} groups are lost: ask for more texts a query, or use a better LLM")
        kept = Counter(self.texts.loc[self._kept, "kind"])
        negatives = sum(number for kind, number in kept.items() if kind != PARAPHRASE)
        for kind in LOOK_ALIKE_KINDS:
            if kept[kind] < _LEAST_OF_A_KIND * negatives:
                found.append(
                    f"{kept[kind]} of {negatives} negatives kept are of the kind {kind}: it will hardly be learnt"
                )
        if self.judged is not None:
            asked, silent = self.judged.total(), self.judged["none"]
            if silent > _MOST_UNJUDGED * asked:
                found.append(f"the judge said nothing on {silent} of {asked} texts: they are kept")
            if asked and max(self.judged["same"], self.judged["different"]) > _MOST_ALIKE * asked:
                found.append(f"the judge says nearly the same of all {asked} texts: it may not know the difference")
        return found

    def examples(self, kept: bool) -> list[dict[str, str]]:
        """Draw texts by hash.

        Parameters
        ----------
        kept : bool
            Whether of those that are kept, or of the others.

        Returns
        -------
        list of dict
            Up to 20, each with ``query``, ``kind``, ``text``, ``similarity`` and ``reasons``.
        """
        name = dict(zip(self.queries["query_id"], self.queries["query"], strict=True))
        rows = self.texts[self._kept == kept]
        order = [digest(f"{row.query_id} {row.text}") for row in rows.itertuples()]
        drawn = rows.assign(order=order).sort_values("order").head(_EXAMPLES)
        return [
            {
                "query": on_one_line(name[row.query_id]),
                "kind": row.kind if row.source == "llm" else f"{row.kind} ({row.source})",
                "text": on_one_line(row.text),
                "similarity": f"{row.similarity:.2f}",
                "reasons": ", ".join(row.reasons),
            }
            for row in drawn.itertuples()
        ]

    def markdown(self) -> str:
        """Write the card as Markdown.

        Returns
        -------
        str
            Texts of queries are escaped: they neither format nor link.
        """
        parts = [f"# Triplets of {self.domain}"]
        parts += [f"**Look at this:** {_escaped(warning)}" for warning in self.warnings]
        parts.append(_table(["step", "number"], self.funnel))
        parts += ["## Texts by kind", _table(["kind", "written", "kept"], self.kinds)]
        parts += ["## Texts dropped, by reason", "A text may have several reasons; *alone* counts those with no other."]
        parts.append(_table(["reason", "of", "dropped", "alone"], self.reasons))
        parts += ["## Queries and groups dropped", _table(["reason", "number"], sorted(self.dropped.items()))]
        parts += ["## Similarity to the query, by kind", _table(*self._quantiles())]
        for kept, title in ((True, "kept"), (False, "dropped")):
            rows = [tuple(example.values()) for example in self.examples(kept)]
            parts += [f"## Texts {title}, drawn at random"]
            parts.append(_table(["query", "kind", "text", "similarity", "reasons"], rows))
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Write the card as a page of its own.

        Returns
        -------
        str
            HTML without scripts or links to elsewhere; texts are escaped.
        """
        from jinja2 import Environment
        from markupsafe import Markup

        template = files("cachelora.triplets").joinpath("card.html").read_text(encoding="utf-8")
        page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
        # Our own figure: it holds the names of kinds, and no text.
        return page.render(card=self, histogram=Markup(self._histogram()), quantiles=self._quantiles())

    def _quantiles(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Return the distribution of similarities by kind, as a head and rows."""
        rows = []
        for kind, _, _ in self.kinds:
            values = self.texts.loc[self.texts["kind"] == kind, "similarity"]
            if len(values):
                rows.append((kind, *(f"{values.quantile(share):.2f}" for share in (0.05, 0.25, 0.5, 0.75, 0.95))))
        return ["kind", "5 %", "25 %", "50 %", "75 %", "95 %"], rows

    def _histogram(self) -> str:
        """Draw the similarities by kind, kept and dropped."""
        import matplotlib

        matplotlib.use("svg")
        # The same picture for the same texts.
        matplotlib.rcParams["svg.hashsalt"] = "cachelora"
        from matplotlib import pyplot

        kinds = [kind for kind, written, _ in self.kinds if written]
        figure, axes = pyplot.subplots(len(kinds), 1, figsize=(7, 1.2 * len(kinds)), sharex=True, layout="constrained")
        for axis, kind in zip([axes] if len(kinds) == 1 else axes, kinds, strict=True):
            mine = self.texts["kind"] == kind
            parts = [
                self.texts.loc[mine & (self._kept == kept), "similarity"].clip(_BINS[0], _BINS[-1])
                for kept in (True, False)
            ]
            axis.hist(parts, bins=_BINS, stacked=True, color=["#2a7f62", "#c8553d"], label=["kept", "dropped"])
            axis.set_ylabel(kind, rotation=0, ha="right")
        axis.set_xlabel("cosine with the query")
        figure.legend(["kept", "dropped"], loc="outside upper right", ncols=2, fontsize="small")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        pyplot.close(figure)
        # Without the XML head, which does not belong inside a page.
        return stream.getvalue()[stream.getvalue().index("<svg") :]


def _escaped(text: object) -> str:
    """Return a text that Markdown shows as it is."""
    plain = on_one_line(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Addresses become links, and dollars formulas, without any bracket.
    escaped = "".join(f"\\{character}" if character in "\\`*_[]()|!#~:$@" else character for character in plain)
    return re.sub(r"(?i)(www)\.", r"\1\.", escaped)


def _table(head: list[str], rows: Sequence[tuple[object, ...]]) -> str:
    """Write a Markdown table."""
    if not rows:
        return "None."
    lines = [head, ["---"] * len(head), *([_escaped(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
