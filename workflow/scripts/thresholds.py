"""Choose the thresholds of one model for false-hit budgets, and try them."""

from pathlib import Path
from typing import TYPE_CHECKING

from cachelora.config import Thresholds
from cachelora.files import read_table, write_table
from cachelora.job import logged
from cachelora.schemas import PAIRS, SCORES, THRESHOLDS
from cachelora.thresholds import thresholds_table

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        parts = {
            Path(path).name.removesuffix(".pairs.parquet"): read_table(path, PAIRS) for path in snakemake.input.pairs
        }
        scores = read_table(snakemake.input.scores, SCORES)
        table = thresholds_table(scores, parts, Thresholds(**snakemake.params.settings))
        write_table(snakemake.output.table, table, THRESHOLDS)
