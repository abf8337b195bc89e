"""Read, group and split the queries of a domain."""

import logging
from typing import TYPE_CHECKING

from cachelora.config import Queries
from cachelora.files import write_rejects, write_table
from cachelora.job import logged
from cachelora.queries import group_queries, read_queries, split_groups
from cachelora.schemas import QUERIES

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        settings = Queries(**snakemake.params.settings)
        source = snakemake.input.source
        queries, rejects = read_queries(source, settings)
        table = split_groups(
            group_queries(queries), settings, snakemake.params.seed, snakemake.params.hold_out_test, source
        )
        logging.info(
            "%s: %d queries, %d set aside, %d groups kept: %s",
            source, len(queries), len(rejects), table["group"].nunique(), table["split"].value_counts().to_dict(),
        )  # fmt: skip
        write_rejects(snakemake.output.rejects, rejects)
        write_table(snakemake.output.table, table, QUERIES)
