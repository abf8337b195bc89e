"""Train a model on the triplets of one domain, or of several."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cachelora.config import BaseModelSource, Train
from cachelora.files import write_json
from cachelora.gpus import lease
from cachelora.job import logged
from cachelora.manifest import write_manifest
from cachelora.models import base_digest
from cachelora.train import Training, remove_checkpoints, train_model
from cachelora.train.curves import draw_training, write_training

if TYPE_CHECKING:
    from snakemake.script import snakemake

# Data-parallel processes import this file again.
if __name__ == "__main__":
    # Snakemake lowers the resource to what the profile allows; the training needs one for each of its processes.
    gpus = snakemake.params.settings["processes"] if snakemake.resources.gpu else 0
    with logged(snakemake.log[0]), lease(gpus):
        started = time.monotonic()
        settings, base = Train(**snakemake.params.settings), BaseModelSource(**snakemake.params.base)
        folder = Path(snakemake.output.model[0]).parent
        metrics = train_model(
            Training(
                base=base,
                triplets={Path(path).stem: path for path in snakemake.input.triplets},
                settings=settings,
                seed=snakemake.params.seed,
                folder=str(folder),
                state=snakemake.params.state,
                threads=snakemake.threads,
                code=snakemake.params.code,
                start=str(Path(snakemake.input.start[0]).parent) if snakemake.input.start else None,
                replayed=snakemake.params.replayed,
            )
        )
        write_training(snakemake.output.log, metrics)
        draw_training(snakemake.output.figure, metrics, f"{snakemake.wildcards.model} on {snakemake.wildcards.base}")
        write_json(folder / "metrics.json", metrics)
        config = {
            "train": snakemake.params.settings,
            "base": snakemake.params.base,
            "base_sha256": base_digest(base),
            "seed": snakemake.params.seed,
            "replayed": snakemake.params.replayed,
            "device": metrics["device"],
        }
        write_manifest(folder, config, [*snakemake.input.triplets, *snakemake.input.start], started)
        remove_checkpoints(snakemake.params.state)
