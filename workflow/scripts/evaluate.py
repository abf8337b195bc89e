"""Measure one model on all test sets, beside the base model."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from cachelora.config import BaseModelSource, Evaluate, Hybrid
from cachelora.evaluate import curves, join_testsets, measure
from cachelora.files import read_table, sha256_of, write_json, write_table
from cachelora.hybrid import read_detector, score_hybrid
from cachelora.job import logged
from cachelora.manifest import hardware
from cachelora.models import load_model, score_pairs
from cachelora.schemas import CURVES, LABELLED, SCORES, TESTSET

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        started = time.monotonic()
        torch.set_num_threads(snakemake.threads)
        settings, base = Evaluate(**snakemake.params.settings), BaseModelSource(**snakemake.params.base)
        testsets = {Path(path).stem: read_table(path, TESTSET) for path in snakemake.input.testsets}
        adapter_files = snakemake.input.get("adapter")
        foreign = snakemake.params.get("foreign")
        adapter = foreign or (Path(adapter_files[0]).parent if adapter_files else None)
        sets = [read_table(path, LABELLED) for path in snakemake.input.sets]
        pairs, routed = pd.concat([join_testsets(testsets), *sets], ignore_index=True), {}
        if hybrid := snakemake.params.get("hybrid"):
            models = snakemake.params.models
            adapters = {Path(path).parent.name: Path(path).parent for path in snakemake.input.models} | {"base": None}
            scores = score_hybrid(
                base, read_detector(base, adapter), Hybrid(**hybrid), models, adapters, pairs, settings.batch_tokens
            )
            for (test_set, model), rows in scores.groupby(["test_set", "route"]):
                routed.setdefault(test_set, {})[model] = rows["test_id"].nunique()
        else:
            scores = score_pairs(load_model(base, adapter, foreign=bool(foreign)), pairs, settings.batch_tokens)
        scores = scores[SCORES.names]
        base_scores = read_table(snakemake.input.base_scores, SCORES) if adapter else scores
        results = measure(scores, base_scores, settings, snakemake.params.seed)
        write_table(snakemake.output.scores, scores, SCORES)
        write_table(snakemake.output.curves, curves(scores, settings, snakemake.params.seed), CURVES)
        write_json(
            snakemake.output.metrics,
            {
                "base_model": snakemake.wildcards.base,
                "model": snakemake.params.model,
                "config": {"evaluate": snakemake.params.settings, "base": snakemake.params.base, "foreign": foreign},
                "inputs": {path: sha256_of(path) for path in snakemake.input},
                "hardware": hardware(),
                "seconds": round(time.monotonic() - started, 1),
                "routed": routed,
                "results": results,
            },
        )
