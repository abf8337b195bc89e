"""Write the report page and its figures."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from cachelora.benchmark import read_findings
from cachelora.config import Evaluate
from cachelora.evaluate import join_testsets
from cachelora.files import read_json, read_table, write_text
from cachelora.job import logged
from cachelora.report import Material, build_page, figures_of, origin_section, time_section
from cachelora.schemas import CURVES, LABELLED, SCORES, TESTSET

if TYPE_CHECKING:
    from snakemake.script import snakemake


def of_base(paths: Iterable[str], base: str, read: Callable[[str], Any]) -> dict[str, Any]:
    """Read the files of a base model, which lie in a folder of its name: by model."""
    return {Path(path).name.partition(".")[0]: read(path) for path in paths if Path(path).parent.name == base}


if __name__ == "__main__":
    with logged(snakemake.log[0]):
        inputs, params = snakemake.input, snakemake.params
        findings = read_findings(
            inputs.evaluations,
            inputs.thresholds,
            inputs.replays,
            inputs.published,
            Evaluate(**params.settings),
            params.threshold_confidence,
            params.deployed,
            params.repeats,
        )
        materials = [
            Material(
                base,
                of_base(inputs.scores, base, lambda path: read_table(path, SCORES)),
                of_base(inputs.curves, base, lambda path: read_table(path, CURVES)),
                of_base(inputs.trainings, base, pd.read_csv),
            )
            for base in params.bases
        ]
        figures = {material.base: figures_of(findings, material) for material in materials}
        for name in next(iter(figures.values())):
            for path in snakemake.output[name]:
                write_text(path, figures[Path(path).parent.name][name].svg)
        timings = []
        for path in map(Path, inputs.timings):
            row = pd.read_csv(path, sep="\t", na_values="-").iloc[0]
            stage = str(path).rpartition("/timing/")[2].partition("/")[0]
            timings.append((stage, float(row["s"]), float(row["cpu_time"])))
        testsets = {Path(path).stem: read_table(path, TESTSET) for path in inputs.testsets}
        manifests = [read_json(path) for path in inputs.manifests]
        page = build_page(
            findings,
            materials,
            figures,
            pd.concat([join_testsets(testsets), *(read_table(path, LABELLED) for path in inputs.sets)]),
            {Path(path).stem: read_json(path) for path in inputs.funnels},
            [origin_section(manifests[0], read_json(inputs.evaluations[0])), time_section(timings, manifests)],
            yaml.safe_dump(params.config, sort_keys=False, allow_unicode=True),
        )
        write_text(snakemake.output.html, page.html())
