"""Say of every text that was written for a domain's queries why it is dropped, if it is."""

import logging
from collections import Counter
from typing import TYPE_CHECKING

import torch

from cachelora.config import BaseModelSource, Filter
from cachelora.files import read_table, write_table
from cachelora.filter import filter_texts
from cachelora.job import logged
from cachelora.models import load_model, use_bfloat16
from cachelora.schemas import AUGMENTED, FILTERED, QUERIES

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        torch.set_num_threads(snakemake.threads)
        settings = Filter(**snakemake.params.settings)
        queries = read_table(snakemake.input.queries, QUERIES)
        augmented = read_table(snakemake.input.augmented, AUGMENTED)
        model = load_model(BaseModelSource(**snakemake.params.base), None)
        bfloat16 = use_bfloat16(settings.precision, model.device)
        table = filter_texts(queries, augmented, settings, model, bfloat16)
        for reason, number in Counter(reason for reasons in table["reasons"] for reason in reasons).most_common():
            logging.info("%d texts: %s", number, reason)
        write_table(snakemake.output.table, table, FILTERED)
