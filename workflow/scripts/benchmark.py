"""Put all evaluations into one table."""

from typing import TYPE_CHECKING

from cachelora.benchmark import benchmark_markdown, read_findings
from cachelora.config import Evaluate
from cachelora.files import replacing, write_text
from cachelora.job import logged

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        findings = read_findings(
            snakemake.input.evaluations,
            snakemake.input.thresholds,
            snakemake.input.replays,
            snakemake.input.published,
            Evaluate(**snakemake.params.settings),
            snakemake.params.threshold_confidence,
            snakemake.params.deployed,
            snakemake.params.repeats,
        )
        with replacing(snakemake.output.csv) as temporary:
            findings.table.to_csv(temporary, index=False)
        with replacing(snakemake.output.parquet) as temporary:
            findings.table.to_parquet(temporary, index=False)
        write_text(snakemake.output.markdown, benchmark_markdown(findings))
