"""Merge an adapter into its base model, for use without peft."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cachelora.config import BaseModelSource
from cachelora.deploy import deploy_model
from cachelora.files import read_table, write_text
from cachelora.job import logged
from cachelora.manifest import MANIFEST, write_manifest
from cachelora.models import base_digest
from cachelora.schemas import TESTSET

if TYPE_CHECKING:
    from snakemake.script import snakemake

if __name__ == "__main__":
    with logged(snakemake.log[0]):
        started = time.monotonic()
        torch.set_num_threads(snakemake.threads)
        base = BaseModelSource(**snakemake.params.base)
        adapter = Path(snakemake.input.adapter[0]).parent
        probes = [text for path in snakemake.input.testsets for text in read_table(path, TESTSET)["anchor"].head(20)]
        folder = Path(snakemake.output.folder)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        deploy_model(base, adapter, snakemake.wildcards.model, probes, snakemake.params.batch_tokens, unfinished)
        config = {"base": snakemake.params.base, "base_sha256": base_digest(base)}
        write_manifest(unfinished, config, snakemake.input.adapter, started)
        unfinished.replace(folder)
        write_text(snakemake.output.manifest, (folder / MANIFEST).read_text(encoding="utf-8"))
