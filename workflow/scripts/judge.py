"""Ask a judge about the texts of one shard that the filters have kept."""

import logging
import math
from typing import TYPE_CHECKING

from cachelora.augment import query_live
from cachelora.augment.engine import make_engine
from cachelora.config import Judge, engine_settings
from cachelora.files import read_table, write_table, write_text
from cachelora.gpus import lease
from cachelora.job import logged
from cachelora.judge import Verdicts, pairs_to_judge, replay
from cachelora.judge.prompt import JudgePrompts
from cachelora.schemas import FILTERED, QUERIES, VERDICTS

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    # Snakemake lowers the resource to what the profile allows; vLLM needs as many as it divides the model over.
    gpus = snakemake.params.engine.get("gpus", 1) if snakemake.resources.get("gpu") else 0
    with logged(snakemake.log[0]), lease(gpus):
        settings, shards = Judge(**snakemake.params.settings), snakemake.params.shards
        domain, number = snakemake.wildcards.domain, int(snakemake.wildcards.shard)
        queries = read_table(snakemake.input.queries, QUERIES)
        pairs = pairs_to_judge(queries, read_table(snakemake.input.filtered, FILTERED), number, shards)
        verdicts = Verdicts(pairs, settings.max_failed_share, f"judge, {domain}, shard {number} of {shards}")
        if snakemake.params.engine["type"] == "recorded":
            replay(snakemake.input.verdicts, verdicts, snakemake.params.max_reject_share)
        elif snakemake.params.engine["type"] == "cross_encoder":
            import torch

            from cachelora.judge.cross_encoder import CrossEncoderJudge

            torch.set_num_threads(snakemake.threads)
            judge = CrossEncoderJudge(settings.cross_encoder)
            for pair_id, score in zip(pairs["pair_id"], judge.scores(pairs["query"], pairs["text"]), strict=True):
                same = None if math.isnan(score) else bool(score >= settings.threshold)
                verdicts.put(pair_id, same, "cross_encoder", judge.name, "")
        else:
            engine = make_engine(
                engine_settings(snakemake.params.engine, snakemake.resources.llm_slots),
                JudgePrompts(snakemake.params.prompt),
                snakemake.params.seed,
                snakemake.threads,
            )
            query_live(engine, verdicts, snakemake.params.journal, f"{domain}-{number}-of-{shards}")
        logging.info("%d pairs: %s", len(pairs), verdicts.progress)
        write_table(snakemake.output.table, verdicts.table(), VERDICTS)
        write_text(snakemake.output.recording, verdicts.recording())
