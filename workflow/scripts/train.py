"""Train an adapter on the triplets of one domain, or of all."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cachelora.config import BaseModelSource, Train
from cachelora.files import read_table, write_json
from cachelora.job import logged
from cachelora.manifest import write_manifest
from cachelora.models import base_digest, load_model
from cachelora.schemas import TRIPLETS
from cachelora.train import train_adapter

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        started = time.monotonic()
        torch.set_num_threads(snakemake.threads)
        settings, base = Train(**snakemake.params.settings), BaseModelSource(**snakemake.params.base)
        triplets = {Path(path).stem: read_table(path, TRIPLETS) for path in snakemake.input.triplets}
        folder = Path(snakemake.output[0]).parent
        metrics = train_adapter(
            load_model(base, None, device=None), triplets, settings, snakemake.params.seed, base.name, folder
        )
        write_json(folder / "metrics.json", metrics)
        config = {
            "train": snakemake.params.settings,
            "base": snakemake.params.base,
            "base_sha256": base_digest(base),
            "seed": snakemake.params.seed,
        }
        write_manifest(folder, config, snakemake.input.triplets, started)
