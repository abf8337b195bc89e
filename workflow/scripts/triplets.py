"""Group what was kept of the texts for a domain's queries into triplets, and describe what became of the rest."""

import logging
from collections import Counter
from typing import TYPE_CHECKING

from cachelora.config import Triplets
from cachelora.files import read_table, write_json, write_table, write_text
from cachelora.job import logged
from cachelora.schemas import FILTERED, QUERIES, TESTSET, TRIPLETS, VERDICTS
from cachelora.triplets import drop_test_copies, kept_texts, make_groups, make_triplets, text_reasons
from cachelora.triplets.card import DataCard

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        settings = Triplets(**snakemake.params.settings)
        queries = read_table(snakemake.input.queries, QUERIES)
        verdicts = read_table(snakemake.input.verdicts, VERDICTS) if snakemake.input.verdicts else None
        used = queries[queries["split"] != "test"]
        filtered = read_table(snakemake.input.filtered, FILTERED)
        texts = kept_texts(filtered[filtered["query_id"].isin(used["query_id"])], verdicts)
        testsets = [read_table(path, TESTSET) for path in snakemake.input.testsets]
        groups, unusable = make_groups(used, texts)
        groups, leaking = drop_test_copies(groups, testsets, settings.near_copy)
        reasons = text_reasons(texts)
        for reason, number in reasons.most_common():
            logging.info("%d times dropped, %s", number, reason)
        judged = None if verdicts is None else Counter(verdicts["verdict"])
        if judged is not None:
            logging.info("the judge: %s", ", ".join(f"{number} {verdict}" for verdict, number in judged.items()))
        table = make_triplets(groups, settings.grouping, unusable + leaking + reasons, snakemake.params.source)
        card = DataCard(snakemake.wildcards.domain, queries, texts, table, unusable + leaking, judged)
        for warning in card.warnings:
            logging.warning("%s", warning)
        for step, number in card.funnel:
            logging.info("%d %s", number, step)
        write_text(snakemake.output.markdown, card.markdown())
        write_text(snakemake.output.html, card.html())
        write_json(snakemake.output.funnel, card.funnel)
        write_table(snakemake.output.table, table, TRIPLETS)
