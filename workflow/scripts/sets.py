"""Read a test set that belongs to no domain, from its file or from its address."""

import logging
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cachelora.files import write_table
from cachelora.job import logged
from cachelora.schemas import LABELLED
from cachelora.sets import fetch_set, read_set

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]), TemporaryDirectory() as folder:
        settings = snakemake.params.settings
        path = snakemake.input.get("source") or fetch_set(settings["source"], folder)
        table = read_set(path, snakemake.wildcards.set, settings["sha256"])
        logging.info("%d pairs in %d groups", len(table), table["group"].nunique())
        write_table(snakemake.output.table, table, LABELLED)
