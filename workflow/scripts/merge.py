"""Merge adapters into one."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cachelora.config import BaseModelSource, Merge
from cachelora.files import write_json
from cachelora.job import logged
from cachelora.manifest import write_manifest
from cachelora.merge import merge_adapters
from cachelora.models import base_digest, use_bfloat16
from cachelora.train.validation import Validation, read_validation

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        started = time.monotonic()
        torch.set_num_threads(snakemake.threads)
        settings, base = Merge(**snakemake.params.settings), BaseModelSource(**snakemake.params.base)
        adapters = {Path(path).parent.name: Path(path).parent for path in snakemake.input.adapters}
        folder = Path(snakemake.output[0]).parent
        most = snakemake.params.validation_groups
        triplets = {Path(path).stem: read_validation(path, most) for path in snakemake.input.triplets}
        validate = Validation(triplets, use_bfloat16(snakemake.params.precision, torch.device("cpu")))
        most_lost, seed = snakemake.params.most_lost, snakemake.params.seed
        _, found = merge_adapters(base, adapters, settings, folder, validate, most_lost, seed)
        write_json(folder / "metrics.json", found)
        config = {
            "merge": snakemake.params.settings,
            "seed": seed,
            "most_lost_similarity": most_lost,
            "validation_groups": most,
            "precision": snakemake.params.precision,
            "base": snakemake.params.base,
            "base_sha256": base_digest(base),
        }
        write_manifest(folder, config, [*snakemake.input.adapters, *snakemake.input.triplets], started)
