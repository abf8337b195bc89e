"""Get the paraphrases and hard negatives of one shard, from a live engine or a recording."""

from typing import TYPE_CHECKING

from cachelora.augment import query_live
from cachelora.augment.engine import make_engine
from cachelora.augment.prompt import AugmentPrompts
from cachelora.augment.recorded import Recorded
from cachelora.augment.shard import Shard, shard_queries
from cachelora.config import Augment, engine_settings
from cachelora.files import read_table, write_json, write_table, write_text
from cachelora.gpus import lease
from cachelora.job import logged
from cachelora.schemas import AUGMENTED, QUERIES

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    # Snakemake lowers the resource to what the profile allows; vLLM needs as many as it divides the model over.
    gpus = snakemake.params.engine.get("gpus", 1) if snakemake.resources.get("gpu") else 0
    with logged(snakemake.log[0]), lease(gpus):
        settings = Augment(**snakemake.params.settings)
        domain, number = snakemake.wildcards.domain, int(snakemake.wildcards.shard)
        queries = shard_queries(read_table(snakemake.input.queries, QUERIES), number, settings.shards)
        where = f"{domain}, shard {number} of {settings.shards}"
        if snakemake.params.engine["type"] == "recorded":
            shard = Shard(queries, settings, where, Recorded.remedy)
            for reply in Recorded(snakemake.input.recording, snakemake.params.max_reject_share).replies(queries):
                shard.add(reply)
            about = {"engine": "recorded", "recording": snakemake.input.recording}
        else:
            shard = Shard(queries, settings, where, "Use a stronger model, ask for less, or raise that share")
            prompts = AugmentPrompts(
                snakemake.params.prompt, settings.paraphrases, settings.negatives, settings.max_chars
            )
            engine = make_engine(
                engine_settings(snakemake.params.engine, snakemake.resources.llm_slots),
                prompts,
                snakemake.params.seed,
                snakemake.threads,
            )
            run = query_live(engine, shard, snakemake.params.journal, f"{domain}-{number}-of-{settings.shards}")
            about = {"engine": engine.version, "model": engine.model, "identity": engine.identity, "run": run}
        write_table(snakemake.output.table, shard.table(), AUGMENTED)
        write_text(snakemake.output.recording, shard.recording())
        write_json(
            snakemake.output.summary,
            {"domain": domain, "shard": number, "shards": settings.shards, **about, **shard.summary()},
        )
