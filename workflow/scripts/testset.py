"""Make the test set of a domain and its labelled pairs, from its file or from the queries that were held out."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cachelora.files import read_table, write_rejects, write_table
from cachelora.job import logged
from cachelora.schemas import FILTERED, PAIRS, QUERIES, TESTSET, TRIPLETS
from cachelora.testset import (
    Frozen,
    drop_trained_on,
    frozen_version,
    make_pairs,
    read_testset,
    testset_from_groups,
)
from cachelora.triplets import by_words_alone, make_groups

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        source = snakemake.input.get("triplets")
        if source:
            frozen = snakemake.params.frozen
            version = frozen_version(source, frozen and Frozen(**frozen))
            table, rejects = read_testset(source, snakemake.params.max_reject_share, version)
        else:
            queries = read_table(snakemake.input.queries, QUERIES)
            groups, _ = make_groups(
                queries[queries["split"] == "test"], by_words_alone(read_table(snakemake.input.filtered, FILTERED))
            )
            source = snakemake.params.source
            table, rejects = testset_from_groups(groups, source), []
        trained_on = {Path(path).stem: read_table(path, TRIPLETS) for path in snakemake.input.trained_on}
        table, dropped = drop_trained_on(table, trained_on, snakemake.params.near_copy, source)
        rejects += dropped
        logging.info("%d triplets, %d set aside", len(table), len(rejects))
        write_rejects(snakemake.output.rejects, rejects)
        pairs = make_pairs(table, snakemake.params.settings["calibration_share"], snakemake.params.seed)
        write_table(snakemake.output.pairs, pairs, PAIRS)
        write_table(snakemake.output.table, table, TESTSET)
