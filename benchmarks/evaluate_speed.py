"""Time of the evaluation: triplets against one text at a time, and a million labelled pairs. See docs/metrics.md.

python benchmarks/evaluate_speed.py triplets --adapter results/models/minilm-l6/joint
python benchmarks/evaluate_speed.py pairs 1000000
"""

import argparse
import json
import resource
import time

import numpy as np
import pandas as pd
import torch

from cachelora.config import read_config
from cachelora.evaluate import measure
from cachelora.models import load_model, score_triplets
from cachelora.schemas import SCORES

TRIPLETS = 2000
TIMED = 200
AT_ONCE = 10_000


def triplets(adapter: str | None, threads: int) -> None:
    """Time triplets of both forms: distinct ones, and those of a few queries that share their texts."""
    torch.set_num_threads(threads)
    config = read_config("config/domains.yaml")
    base = next(iter(config.base_models.values()))
    # The seeds leave the adapter beside the weights.
    model, theirs = load_model(base, adapter), load_model(base, adapter, folded=False)
    print("| 2,000 triplets | distinct texts | one text at a time, s | as here, s | times as fast |")
    print("|---|---|---|---|---|")
    for name, table in (
        ("all texts distinct", distinct(config)),
        ("3 paraphrases x 2 negatives a query", product(config)),
    ):
        table = table.head(TRIPLETS)
        texts = table[["anchor", "positive", "negative"]].to_numpy().ravel()
        for warmed in (theirs, model):
            warmed.encode(texts[:TIMED].tolist())
        started = time.monotonic()
        for text in texts[:TIMED]:
            theirs.encode(text, show_progress_bar=False)
        single = (time.monotonic() - started) / TIMED * len(texts)
        started = time.monotonic()
        score_triplets(model, table, config.evaluate.batch_tokens)
        ours = time.monotonic() - started
        print(f"| {name} | {len(set(texts))} | {single:.1f} | {ours:.1f} | {single / ours:.1f} |")


def distinct(config: object) -> pd.DataFrame:
    """Make triplets of the recordings' texts, each text once."""
    rows = [
        (record["query"], record["paraphrases"][0], record["negatives"][0]["text"]) for record in recorded(config)
    ] + [(r["paraphrases"][1], r["paraphrases"][2], r["negatives"][1]["text"]) for r in recorded(config)]
    return pd.DataFrame(rows, columns=["anchor", "positive", "negative"])


def product(config: object) -> pd.DataFrame:
    """Make triplets as seed document 003 does: every paraphrase of a query with every negative."""
    rows = [
        (paraphrase, record["query"], negative["text"])
        for record in recorded(config)
        for paraphrase in record["paraphrases"][:3]
        for negative in record["negatives"][:2]
    ]
    return pd.DataFrame(rows, columns=["anchor", "positive", "negative"])


def recorded(config: object) -> list[dict]:
    """Read the recordings that have texts enough."""
    records = [
        json.loads(line)
        for domain in config.domains.values()
        for line in open(domain.recording, encoding="utf-8")  # noqa: SIM115, PTH123
    ]
    return [record for record in records if len(record["paraphrases"]) > 2 and len(record["negatives"]) > 1]


def pairs(number: int, threads: int) -> None:
    """Time all metrics and intervals of so many labelled pairs of a tenth as many texts, their embeddings given."""
    random = np.random.default_rng(1)
    texts = max(10, number // 10)
    vectors = random.normal(size=(texts, 384)).astype(np.float32) + 0.8
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    one, other = random.integers(texts, size=(2, number))
    same = random.random(number) < 0.5
    ids = np.char.mod("%d", np.arange(number))
    groups = np.char.mod("%d", random.integers(number // 2, size=number))
    config = read_config("config/domains.yaml")
    started = time.monotonic()
    similarity = np.concatenate(
        [
            np.einsum("ij,ij->i", vectors[one[start : start + AT_ONCE]], vectors[other[start : start + AT_ONCE]])
            for start in range(0, number, AT_ONCE)
        ]
    )
    # Pairs with the same answer are nearer.
    similarity = np.clip(similarity + 0.03 * same, -1, 1)
    scores = pd.DataFrame({"test_set": "x", "test_version": "v1", "test_id": ids, "pair_id": ids, "same_answer": same})
    scores = scores.assign(kind="", group=groups, similarity=similarity)[SCORES.names]
    rows = measure(scores, scores, config.evaluate, config.seed, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{number} pairs, {len(rows)} metrics: {time.monotonic() - started:.0f} s, {peak:.2f} GiB")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("triplets").add_argument("--adapter")
    commands.add_parser("pairs").add_argument("number", type=int)
    arguments = parser.parse_args()
    if arguments.what == "triplets":
        triplets(arguments.adapter, arguments.threads)
    else:
        pairs(arguments.number, arguments.threads)


if __name__ == "__main__":
    main()
