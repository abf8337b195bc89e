"""Put all evaluations into one table."""

from typing import TYPE_CHECKING

from cachelora.benchmark import benchmark_markdown, benchmark_table, read_published
from cachelora.config import Evaluate
from cachelora.files import read_json, replacing, write_text
from cachelora.job import logged

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        settings = Evaluate(**snakemake.params.settings)
        evaluations = [read_json(path) for path in snakemake.input.evaluations]
        published = read_published(snakemake.input.published)
        table = benchmark_table(evaluations, published)
        with replacing(snakemake.output.csv) as temporary:
            table.to_csv(temporary, index=False)
        markdown = benchmark_markdown(
            table, published, settings.confidence, settings.false_hit_budget, snakemake.params.repeats
        )
        write_text(snakemake.output.markdown, markdown)
