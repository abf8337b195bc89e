"""Compare the trials of a sweep and write down the choice."""

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cachelora.files import read_json, write_text
from cachelora.job import logged
from cachelora.sweep import chosen_settings, sweep_report, sweep_table

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        results = {Path(path).parent.name: read_json(path) for path in snakemake.input.metrics}
        table = sweep_table(snakemake.params.trials, results, snakemake.params.recipe["most_lost_similarity"])
        write_text(snakemake.output.table, table.to_csv(index=False))
        write_text(snakemake.output.report, sweep_report(table, snakemake.wildcards.base))
        write_text(
            snakemake.output.choice, yaml.safe_dump(chosen_settings(table, snakemake.params.recipe), sort_keys=False)
        )
