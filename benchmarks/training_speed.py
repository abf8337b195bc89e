"""Training speed: this project's trainer against the recipe of the seeds, on the same triplets, base model and CPU.

    python benchmarks/training_speed.py results/triplets/*.parquet

The seeds' trainer is re-built here as their documents and its source describe it: pairs only, every text padded to
128 tokens, anchors and positives in forward passes of their own, float32, LoRA of rank 8 on query and value with a
dropout of 0.1, AdamW at 2e-5, batches of 32 rows in random order. A triplet is a row of the input: an anchor, its
positive and its hard negatives. The seeds train on the first two of them; this project on all, with the recipe of
config/domains.yaml. The arms alternate; what is timed is the steps alone, without loading and validation. Last, where
this project's time goes, by torch's profiler, and how near it comes to what the CPU's matrix products could do.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, TaskType
from torch.nn import functional
from torch.utils.data import DataLoader

from cachelora.config import BaseModelSource, Train, read_config
from cachelora.files import read_table, write_table
from cachelora.manifest import hardware
from cachelora.models import load_model
from cachelora.schemas import TRIPLETS
from cachelora.train import Training, train_model

_PADDED_TO = 128


def seeds_seconds(base: BaseModelSource, table: pd.DataFrame, seed: int) -> float:
    """Train one epoch the seeds' way.

    Parameters
    ----------
    base : BaseModelSource
        The base model.
    table : pandas.DataFrame
        Training rows in the columns of :data:`cachelora.schemas.TRIPLETS`.
    seed : int
        Seed of the order.

    Returns
    -------
    float
        Duration of the steps in seconds.
    """
    torch.manual_seed(seed)
    model = load_model(base, None)
    model.add_adapter(
        LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=8,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules=["query", "value"],
        )
    )
    network, tokenizer = model.transformers_model.train(), model.tokenizer
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=2e-5)
    rows = list(table[["anchor", "positive"]].itertuples(index=False, name=None))

    def embed(texts: tuple[str, ...]) -> torch.Tensor:
        tokens = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=_PADDED_TO, return_tensors="pt"
        )
        states = network(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    started = time.perf_counter()
    for batch in DataLoader(rows, batch_size=32, shuffle=True, collate_fn=lambda found: list(zip(*found, strict=True))):
        anchors, positives = map(embed, batch)
        loss = functional.cross_entropy(anchors @ positives.T / 0.05, torch.arange(len(anchors)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started


def our_seconds(base: BaseModelSource, path: Path, settings: Train, seed: int, threads: int) -> tuple[float, int]:
    """Train one epoch this project's way.

    Parameters
    ----------
    base : BaseModelSource
        The base model.
    path : Path
        The same rows, in a file.
    settings : Train
        The recipe.
    seed : int
        Seed of everything.
    threads : int
        CPU threads.

    Returns
    -------
    seconds : float
        Duration of the steps.
    steps : int
        Their number.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            base, {"all": str(path)}, settings, seed, f"{folder}/model", f"{folder}/state", threads=threads
        )
        metrics = train_model(training)
    return metrics["device"]["step_seconds"], metrics["steps"]


def operation_shares(base: BaseModelSource, path: Path, settings: Train, threads: int) -> dict[str, float]:
    """Profile one epoch this project's way.

    Parameters
    ----------
    base, path, settings, threads
        As in :func:`our_seconds`.

    Returns
    -------
    dict of str to float
        The share of each operation in the CPU time of all, largest first.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        our_seconds(base, path, settings, 0, threads)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages() if event.key.startswith("aten::")}
    total = sum(spent.values())
    return {name: time / total for name, time in sorted(spent.items(), key=lambda item: -item[1])}


def product_rate(dtype: torch.dtype, size: int = 2048, seconds: float = 3.0) -> float:
    """Measure square matrix products.

    Parameters
    ----------
    dtype : torch.dtype
        Their arithmetic.
    size : int
        Rows and columns.
    seconds : float
        For how long.

    Returns
    -------
    float
        Operations a second, in GFLOP/s.
    """
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started) / 1e9


def main() -> None:
    """Run the benchmark and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triplets", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=192, help="groups to train on, drawn from all files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--train", type=json.loads, default={}, help="changes of the recipe, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = read_config("config/domains.yaml")
    base = config.base_models["minilm-l6"]
    settings = Train.model_validate(
        {**config.train.model_dump(), "epochs": 1, "validation_groups": 2, **arguments.train}
    )
    table = pd.concat([read_table(path, TRIPLETS) for path in arguments.triplets], ignore_index=True)
    names = table.loc[table["split"] == "train", "group"].unique()
    drawn = np.random.default_rng(config.seed).permutation(names)[: arguments.groups]
    rows = table[table["group"].isin(drawn)].reset_index(drop=True)
    validation = table[table["split"] == "validation"].head(4)

    tokenizer = load_model(base, None).tokenizer
    texts = sorted(
        {*rows["anchor"], *rows["positive"], *(item["text"] for found in rows["negatives"] for item in found)}
    )
    lengths = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    print(json.dumps(hardware()), "threads:", arguments.threads)
    flags = Path("/proc/cpuinfo")
    if flags.is_file():
        known = set(flags.read_text(encoding="utf-8").split("flags", 1)[-1].partition("\n")[0].split())
        print("CPU flags:", *sorted(known & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}))
    print(f"{len(rows)} triplets of {len(drawn)} groups, {len(texts)} texts; tokens of a text:")
    counts, edges = np.histogram(lengths, bins=[0, 8, 12, 16, 24, 32, 48, 64, 128, 256])
    print(", ".join(f"{low}-{high - 1}: {n}" for (low, high), n in zip(itertools.pairwise(edges), counts, strict=True)))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        write_table(path, pd.concat([rows, validation], ignore_index=True), TRIPLETS)
        rates: dict[str, list[float]] = {"seeds": [], "cachelora": []}
        for number in range(arguments.rounds):
            rates["seeds"].append(len(rows) / seeds_seconds(base, rows, number))
            seconds, steps = our_seconds(base, path, settings, number, arguments.threads)
            share = steps * min(settings.batch_size, len(drawn)) / len(drawn)
            rates["cachelora"].append(len(rows) * share / seconds)
            print(
                f"round {number + 1}:", ", ".join(f"{name} {found[-1]:.1f} triplets/s" for name, found in rates.items())
            )
        shares = operation_shares(base, path, settings, arguments.threads)
    middle = {name: float(np.median(found)) for name, found in rates.items()}
    print(f"median: {middle}, ratio {middle['cachelora'] / middle['seeds']:.1f}")
    print(
        "where the time goes:", ", ".join(f"{name[6:]} {share:.0%}" for name, share in shares.items() if share >= 0.01)
    )

    weights = sum(
        p.numel() for name, p in load_model(base, None).named_parameters() if ".layer." in name and p.ndim == 2
    )
    # Forward, and backward to the activations: two operations a weight and token each; frozen weights have no gradient.
    operations = 4 * weights * lengths.sum() / len(rows)
    print(f"matrix products of the frozen layers alone: {operations / 1e9:.2f} GFLOP a triplet; they would allow")
    for dtype in (torch.float32, torch.bfloat16):
        rate = product_rate(dtype)
        print(f"  {rate * 1e9 / operations:.0f} triplets/s at {rate:.0f} GFLOP/s ({dtype}, products of 2048 x 2048)")


if __name__ == "__main__":
    main()
