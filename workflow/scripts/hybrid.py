"""Fit the domain detector of a hybrid on the queries of all domains."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cachelora.config import BaseModelSource, Hybrid
from cachelora.files import read_table, write_json
from cachelora.hybrid import calibration_error, detector_metrics, fit_detector, stacked
from cachelora.job import logged
from cachelora.manifest import write_manifest
from cachelora.models import base_digest, encode_texts, load_model
from cachelora.schemas import QUERIES, TRIPLETS

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        started = time.monotonic()
        torch.set_num_threads(snakemake.threads)
        settings, base = Hybrid(**snakemake.params.settings), BaseModelSource(**snakemake.params.base)
        model = load_model(base, None)
        vectors: dict[str, dict[str, np.ndarray]] = {"train": {}, "validation": {}}
        for path, triplets in zip(snakemake.input.queries, snakemake.input.triplets, strict=True):
            queries = read_table(path, QUERIES)
            # Groups that hold a test text have no triplets.
            known = queries["canonical"] & queries["group"].isin(read_table(triplets, TRIPLETS)["group"])
            for split, found in vectors.items():
                texts = queries.loc[known & (queries["split"] == split), "query"]
                encoded = encode_texts(model, texts, snakemake.params.batch_tokens)
                found[Path(path).stem] = np.array([*encoded.values()])
        detector = fit_detector(**vectors, method=settings.detector)
        folder = Path(snakemake.output[0]).parent
        detector.save(folder)
        held_out, labels = stacked(vectors["validation"])
        said = detector.probabilities(held_out)
        metrics = {
            "queries": {domain: len(found) for domain, found in vectors["train"].items()},
            "validation": {
                domain: detector_metrics(said[labels == number], number, settings.reject)
                for number, domain in enumerate(detector.domains)
            },
            "calibration_error": calibration_error(said, labels),
        }
        for domain, found in metrics["validation"].items():
            logging.info("%s: %s", domain, found)
        write_json(folder / "metrics.json", metrics)
        config = {
            "hybrid": snakemake.params.settings,
            "models": snakemake.params.models,
            "base": snakemake.params.base,
            "base_sha256": base_digest(base),
        }
        write_manifest(folder, config, [*snakemake.input.queries, *snakemake.input.triplets], started)
