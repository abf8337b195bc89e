"""Put the shards of a domain together."""

import heapq
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cachelora.augment.shard import recording_key
from cachelora.files import read_table, replacing, write_table
from cachelora.job import logged
from cachelora.schemas import AUGMENTED, VERDICTS

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        schema = {"augmented": AUGMENTED, "judged": VERDICTS}[snakemake.params.what]
        shards = pd.concat([read_table(path, schema) for path in snakemake.input.shards])
        # Sorted, so that the number of shards does not show in the result; stable, so that texts keep their order.
        write_table(snakemake.output.table, shards.sort_values("query_id", kind="stable"), schema)
        with replacing(snakemake.output.recording) as path, ExitStack() as stack:
            parts = [stack.enter_context(Path(part).open(encoding="utf-8")) for part in snakemake.input.recordings]
            with path.open("w", encoding="utf-8") as stream:
                stream.writelines(heapq.merge(*parts, key=recording_key))
