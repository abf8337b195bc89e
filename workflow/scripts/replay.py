"""Send a stream of queries through a cache, at each threshold that was chosen for a model."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import faiss
import numpy as np
import pandas as pd
import torch

from cachelora.config import BaseModelSource, Evaluate, Replay
from cachelora.files import read_table, sha256_of, write_json, write_table
from cachelora.job import logged
from cachelora.manifest import hardware
from cachelora.models import encode_texts, load_model
from cachelora.replay import (
    choices_of,
    describe_stream,
    draw_stream,
    frontier,
    latencies,
    replay,
    replay_table,
    summarise,
)
from cachelora.schemas import PAIRS, REPLAY, THRESHOLDS

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        torch.set_num_threads(snakemake.threads)
        faiss.omp_set_num_threads(snakemake.threads)
        settings, evaluate = Replay(**snakemake.params.settings), Evaluate(**snakemake.params.evaluate)
        parts = {
            Path(path).name.removesuffix(".pairs.parquet"): read_table(path, PAIRS) for path in snakemake.input.pairs
        }
        stream = draw_stream(parts, settings, snakemake.params.seed)
        adapter = Path(snakemake.input.adapter[0]).parent if snakemake.input.adapter else None
        model = load_model(BaseModelSource(**snakemake.params.base), adapter)
        encoded = encode_texts(model, stream.texts, evaluate.batch_tokens)
        vectors = np.stack([encoded[text] for text in stream.texts])
        tables, summaries, unmet, largest = [], [], [], []
        for choice in choices_of(read_table(snakemake.input.thresholds, THRESHOLDS)):
            if choice.value is None:
                unmet.append(choice.label)
                continue
            decisions = replay(vectors, stream.events["row"].to_numpy(), choice.value)
            tables.append(replay_table(stream, decisions, choice))
            summaries.append(summarise(tables[-1], choice, evaluate, snakemake.params.seed))
            stored = stream.events["row"].to_numpy()[~decisions.hit]
            largest = max(largest, stored, key=len)
            logging.info("%s: %d of %d queries hit", choice.label, decisions.hit.sum(), len(decisions.hit))
        write_table(snakemake.output.table, pd.concat(tables), REPLAY)
        write_json(
            snakemake.output.summary,
            {
                "base_model": snakemake.wildcards.base,
                "model": snakemake.wildcards.model,
                "config": {
                    "replay": snakemake.params.settings,
                    "evaluate": snakemake.params.evaluate,
                    "base": snakemake.params.base,
                    "seed": snakemake.params.seed,
                },
                "inputs": {path: sha256_of(path) for path in snakemake.input},
                "stream": describe_stream(stream),
                "thresholds": summaries,
                "frontier": frontier(stream, vectors),
                "unmet": unmet,
                "timing": latencies(model, stream.texts, vectors, largest) | {"hardware": hardware()},
            },
        )
