"""Group what was written for a domain's queries into triplets, and count what was dropped."""

import logging
from typing import TYPE_CHECKING

from cachelora.config import Triplets
from cachelora.files import read_table, write_table, write_text
from cachelora.job import logged
from cachelora.schemas import AUGMENTED, QUERIES, TESTSET, TRIPLETS
from cachelora.triplets import data_card, drop_test_copies, make_groups, make_triplets

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        settings = Triplets(**snakemake.params.settings)
        queries = read_table(snakemake.input.queries, QUERIES)
        augmented = read_table(snakemake.input.augmented, AUGMENTED)
        testsets = [read_table(path, TESTSET) for path in snakemake.input.testsets]
        groups, unusable = make_groups(queries[queries["split"] != "test"], augmented)
        groups, leaking = drop_test_copies(groups, testsets, settings.near_copy)
        table = make_triplets(groups, unusable + leaking, snakemake.params.source)
        card = data_card(snakemake.wildcards.domain, queries, augmented, table, unusable + leaking)
        logging.info("%s", card)
        write_text(snakemake.output.card, card)
        write_table(snakemake.output.table, table, TRIPLETS)
