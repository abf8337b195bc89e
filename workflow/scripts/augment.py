"""Get the paraphrases and hard negatives of one shard, from a live engine or a recording."""

from typing import TYPE_CHECKING

from cachelora.augment import LlamaCpp, OpenAI, Recorded, augmented_table, query_live, shard_queries
from cachelora.config import Augment, LlamaCppEngine, OpenAIEngine
from cachelora.files import read_table, write_table
from cachelora.job import logged
from cachelora.schemas import AUGMENTED, QUERIES

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        settings = Augment(**snakemake.params.settings)
        domain, shard = snakemake.wildcards.domain, int(snakemake.wildcards.shard)
        queries = shard_queries(read_table(snakemake.input.queries, QUERIES), shard, settings.shards)
        if snakemake.params.engine["type"] == "recorded":
            engine = Recorded(snakemake.input.recording, snakemake.params.max_reject_share)
            replies = engine.replies(queries)
        else:
            field, seed = snakemake.params.field, snakemake.params.seed
            at_once = snakemake.resources.llm_slots
            if snakemake.params.engine["type"] == "openai":
                engine = OpenAI(OpenAIEngine(**snakemake.params.engine, concurrency=at_once), settings, field, seed)
            else:
                engine = LlamaCpp(
                    LlamaCppEngine(**snakemake.params.engine, slots=at_once), settings, field, seed, snakemake.threads
                )
            name = f"{domain}-{shard}-of-{settings.shards}"
            replies = query_live(engine, queries, snakemake.params.journal, name)
        table = augmented_table(
            queries, replies, engine.type, settings, f"{domain}, shard {shard} of {settings.shards}"
        )
        write_table(snakemake.output.table, table, AUGMENTED)
