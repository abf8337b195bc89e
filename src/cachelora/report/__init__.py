"""Stage `report`: the findings as one page that needs nothing else, with figures."""

import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

import cachelora
from cachelora.benchmark import (
    BASE,
    MEASURED,
    REPLAY,
    Findings,
    Section,
    explanation,
    overviews,
    recommendation,
    report_sections,
)
from cachelora.report.figures import (
    draw_by_kind,
    draw_frontier,
    draw_precision,
    draw_replay,
    draw_similarities,
    draw_trainings,
)
from cachelora.text import on_one_line

WORST = 20
"""Pairs shown of those that a model gets most wrong."""


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes
    ----------
    title : str
        Its heading.
    caption : str
        What it shows, also for those who cannot see it.
    svg : str
        The drawing, as an element of HTML.
    """

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Page:
    """What the page shows, in its order.

    Attributes
    ----------
    explanation : str
        How to read the tables.
    advice : Section
        Which model to take.
    tables : sequence of Section
        The overviews.
    figures : sequence of Figure
        The figures.
    wrong : sequence of Section
        The worst false hits and misses; texts of queries.
    details : sequence of Section
        All other tables, folded.
    provenance : sequence of Section
        What made the numbers.
    config : str
        The configuration.
    """

    explanation: str
    advice: Section
    tables: Sequence[Section]
    figures: Sequence[Figure]
    wrong: Sequence[Section]
    details: Sequence[Section]
    provenance: Sequence[Section]
    config: str

    def html(self) -> str:
        """Write the page.

        Returns
        -------
        str
            HTML without scripts or links to elsewhere; texts are escaped.
        """
        from jinja2 import Environment
        from markupsafe import Markup

        template = files("cachelora.report").joinpath("page.html").read_text(encoding="utf-8")
        page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
        # Our own drawings: they hold names and numbers, and no text of a query.
        return page.render(page=self, drawings=[Markup(figure.svg) for figure in self.figures])


@dataclass(frozen=True)
class Material:
    """What the figures and lists of one base model are made of.

    Attributes
    ----------
    base : str
        The base model.
    scores, curves : mapping of str to pandas.DataFrame
        Of the base model and the deployed one, in the columns of :data:`cachelora.schemas.SCORES` and
        :data:`cachelora.schemas.CURVES`.
    trainings : mapping of str to pandas.DataFrame
        By model, what :func:`cachelora.train.curves.training_table` gives.
    """

    base: str
    scores: Mapping[str, pd.DataFrame]
    curves: Mapping[str, pd.DataFrame]
    trainings: Mapping[str, pd.DataFrame]


def figures_of(findings: Findings, material: Material) -> dict[str, Figure]:
    """Draw the figures of one base model.

    Parameters
    ----------
    findings : Findings
        What was found.
    material : Material
        What it was found on.

    Returns
    -------
    dict of str to Figure
        By the name of the file.
    """
    base, model = material.base, findings.deployed
    table = findings.table
    rows = table[(table["source"] == MEASURED) & (table["base_model"] == base)]
    beside = f"{BASE} (grey) and {model} (green)"
    courses = {
        f"{name}, {found['label']}": [(point["queries"], point["hit_ratio"]) for point in found["over_time"]]
        for name in (BASE, model)
        for found in findings.replays[base, name]["thresholds"]
    }
    both = (BASE, model)
    drawn = {
        "kinds": (
            "Margin and AP by kind",
            f"{beside} by test set and kind of negative, with bootstrap intervals over groups.",
            draw_by_kind(rows, model),
        ),
        "precision": (
            "Precision against cache-hit ratio",
            f"{beside}: a point for each threshold from .40 to 1, with the interval of the precision.",
            draw_precision({name: material.curves[name] for name in both}),
        ),
        "similarities": (
            "Similarities before and after",
            "Cosines of the pairs with the same answer (green) and with another (red). What lies over one another, no "
            "threshold can tell apart.",
            draw_similarities({name: material.scores[name] for name in both}),
        ),
        "trainings": (
            "Training",
            "Loss and AP on the validation split over the steps of each training.",
            draw_trainings(material.trainings),
        ),
        "frontier": (
            "Calls saved against false hits",
            f"{beside} in the replay, a point for each threshold from .50 to 1. One threshold means another thing to "
            "each model: compare them at the same share of false hits.",
            draw_frontier({name: findings.replays[base, name]["frontier"] for name in both}),
        ),
        "replay": (
            "Replay",
            "Share of the queries so far that hit, rightly or not, at each threshold.",
            draw_replay(courses),
        ),
    }
    return {name: Figure(f"{title}, base model {base}", caption, svg) for name, (title, caption, svg) in drawn.items()}


def build_page(
    findings: Findings,
    materials: Sequence[Material],
    figures: Mapping[str, Mapping[str, Figure]],
    labelled: pd.DataFrame,
    funnels: Mapping[str, Sequence[tuple[str, int]]],
    provenance: Sequence[Section],
    config: str,
) -> Page:
    """Put the page together.

    Parameters
    ----------
    findings : Findings
        What was found.
    materials : sequence of Material
        Of each base model.
    figures : mapping of str to mapping
        By base model, what :func:`figures_of` gives.
    labelled : pandas.DataFrame
        The test pairs with their texts, in the columns of :data:`cachelora.schemas.LABELLED`.
    funnels : mapping of str to sequence of (str, int)
        As for :func:`funnel_section`.
    provenance : sequence of Section
        What made the numbers.
    config : str
        The configuration, for reading.

    Returns
    -------
    Page
        The page.
    """
    measured = findings.table[findings.table["source"] == MEASURED]
    tables = [
        section
        for _, rows in measured.groupby("base_model", sort=False)
        for section in overviews(rows, findings.confidence)
    ]
    sections = report_sections(findings)
    tables += [section for section in sections if section.title.startswith(REPLAY)]
    shown = {"What to take", *(section.title for section in tables)}
    wrong = []
    for material in materials:
        scores, before = material.scores[findings.deployed], material.scores[BASE]
        wrong += worst_pairs(scores, before, labelled, findings.deployed)
    return Page(
        explanation(findings),
        Section("What to take", tuple(recommendation(findings))),
        tables,
        [figure for drawn in figures.values() for figure in drawn.values()],
        wrong,
        [funnel_section(funnels), *(part for part in sections if part.title not in shown)],
        provenance,
        config,
    )


def worst_pairs(scores: pd.DataFrame, base_scores: pd.DataFrame, labelled: pd.DataFrame, model: str) -> list[Section]:
    """List the pairs that a model gets most wrong.

    Parameters
    ----------
    scores, base_scores : pandas.DataFrame
        Of the model and of the base model, on the same pairs, in the columns of :data:`cachelora.schemas.SCORES`.
    labelled : pandas.DataFrame
        The pairs, in the columns of :data:`cachelora.schemas.LABELLED`.
    model : str
        The model's id.

    Returns
    -------
    list of Section
        The pairs with another answer of the highest cosine, and those with the same of the lowest.
    """
    texts = labelled.drop_duplicates(["test_set", "pair_id"])[["test_set", "pair_id", "query", "other"]]
    table = scores.assign(before=base_scores["similarity"].to_numpy())
    table = table.merge(texts, on=["test_set", "pair_id"]).drop_duplicates(["test_set", "pair_id"])
    sections = []
    for same, title, rising in ((False, "Worst false hits", False), (True, "Worst misses", True)):
        rows = table[table["same_answer"] == same].sort_values("similarity", ascending=rising, kind="stable")
        shown = pd.DataFrame(
            {
                "test set": row.test_set,
                "kind": "paraphrase" if same else row.kind,
                "query": on_one_line(row.query),
                "the cache holds": on_one_line(row.other),
                "base": f"{row.before:.3f}",
                model: f"{row.similarity:.3f}",
            }
            for row in rows.head(WORST).itertuples()
        )
        about = "with the same answer of the lowest" if same else "with another answer of the highest"
        sections.append(Section(title, (f"The {len(shown)} pairs {about} cosine by `{model}`.",), shown))
    return sections


def funnel_section(funnels: Mapping[str, Sequence[tuple[str, int]]]) -> Section:
    """Put the domains' ways from the log to the triplets side by side.

    Parameters
    ----------
    funnels : mapping of str to sequence of (str, int)
        By domain, what :attr:`cachelora.triplets.card.DataCard.funnel` gives.

    Returns
    -------
    Section
        A row a step, a column a domain.
    """
    steps = list(dict.fromkeys(step for funnel in funnels.values() for step, _ in funnel))
    columns = {domain: dict(map(tuple, funnel)) for domain, funnel in funnels.items()}
    rows = [{"step": step} | {name: str(found.get(step, "")) for name, found in columns.items()} for step in steps]
    return Section(
        "From queries to triplets",
        ("Reasons and drawn examples are in the data card of each domain, results/triplets/*.html.",),
        pd.DataFrame(rows),
    )


def time_section(timings: Iterable[tuple[str, float, float]], manifests: Iterable[Mapping[str, Any]]) -> Section:
    """Add up what the stages took.

    Parameters
    ----------
    timings : iterable of (str, float, float)
        Of each timed job: its stage, wall-clock seconds, seconds of CPU time.
    manifests : iterable of mapping
        Of the trained models; they know whether a GPU computed.

    Returns
    -------
    Section
        A row a stage.
    """
    jobs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for stage, seconds, cpu in timings:
        jobs[stage].append((seconds, cpu))
    devices = [manifest["config"].get("device") or {} for manifest in manifests]
    on_gpu = sum(
        device["seconds"] * device.get("processes", 1) for device in devices if device.get("type") not in (None, "cpu")
    )
    rows = [
        {
            "stage": stage,
            "jobs": str(len(found)),
            "seconds": f"{sum(seconds for seconds, _ in found):.0f}",
            "CPU-seconds": f"{sum(cpu for _, cpu in found):.0f}",
            "GPU-seconds": f"{on_gpu:.0f}" if stage == "train" else "",
        }
        for stage, found in jobs.items()
    ]
    return Section(
        "Time", ("Of the stages that are timed; LLM engines count theirs in results/augmented.",), pd.DataFrame(rows)
    )


def origin_section(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Section:
    """Say what made the numbers.

    Parameters
    ----------
    manifest : mapping
        Of one of the models, for the packages' versions and the machine that trained.
    evaluation : mapping
        What the stage `evaluate` wrote for one of them, for the machine that measured.

    Returns
    -------
    Section
        Commit, versions, hardware.
    """
    rows = {"commit": commit()}
    rows |= {f"version of {name}": version for name, version in manifest["versions"].items()}
    for where, machine in (("trained on", manifest["hardware"]), ("measured on", evaluation["hardware"])):
        gpus = ", ".join(machine["gpus"]) or "no GPU"
        rows[where] = f"{machine['system']}, {machine['processor']}, {machine['cpus']} CPUs, {gpus}"
    table = pd.DataFrame({"what": rows.keys(), "is": [str(value) for value in rows.values()]})
    return Section("Made by", (), table)


def commit() -> str:
    """Return the commit of the code that runs.

    Returns
    -------
    str
        Its abbreviated name, with a mark if files differ from it; "unknown" outside a repository.
    """
    command = ["git", "-C", str(Path(cachelora.__file__).parent), "describe", "--always", "--dirty=, changed since"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
