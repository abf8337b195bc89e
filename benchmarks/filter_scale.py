"""Time and peak memory of the filters on many texts. See docs/filters.md.

    python benchmarks/filter_scale.py 25000 50000 100000 200000

The texts are those of the shipped recordings, each query and what was written for it with a subject of their own added,
so that all are different and about as long as real ones. Each size runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import resource
import time

import pandas as pd
import torch

from cachelora.config import read_config
from cachelora.filter import filter_texts
from cachelora.models import load_model, use_bfloat16
from cachelora.queries import group_queries
from cachelora.schemas import AUGMENTED, PARAPHRASE

PLACES = ("home", "work", "school", "the office", "the clinic", "the shop", "a farm", "the lab", "court", "sea")


def tables(size: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make queries and so many augmented texts."""
    config = read_config("config/domains.yaml")
    records = [
        json.loads(line)
        for domain in config.domains.values()
        for line in open(domain.recording, encoding="utf-8")  # noqa: SIM115, PTH123
    ]
    asked, written = [], []
    round_ = 0
    while len(written) < size:
        added = f" at {PLACES[round_ % len(PLACES)]} {round_ // len(PLACES) or ''}".rstrip() if round_ else ""
        for record in records:
            query = record["query"] + added
            asked.append(query)
            written += [(query, PARAPHRASE, text + added) for text in record["paraphrases"]]
            written += [(query, negative["kind"], negative["text"] + added) for negative in record["negatives"]]
            if len(written) >= size:
                break
        round_ += 1
    queries = group_queries(asked).assign(split="train")
    name = dict(zip(queries["query"], queries["query_id"], strict=True))
    rows = [(name[query], kind, text, "e", "m", "v") for query, kind, text in written[:size] if query in name]
    return queries, pd.DataFrame(rows, columns=AUGMENTED.names)


def measure(size: int, threads: int, results: multiprocessing.Queue) -> None:
    """Filter so many texts and report seconds, peak memory and what is kept."""
    torch.set_num_threads(threads)
    config = read_config("config/domains.yaml")
    queries, augmented = tables(size)
    model = load_model(config.base_models[config.filter_base_model], None)
    started = time.monotonic()
    found = filter_texts(queries, augmented, config.filter, model, use_bfloat16("auto", model.device))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kept = (found["reasons"].map(len) == 0).mean()
    results.put((len(augmented), len(queries), seconds, peak, kept))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print("| texts | queries | seconds | texts a second | peak memory, GiB | kept |")
    print("|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for size in arguments.sizes:
        results = context.Queue()
        process = context.Process(target=measure, args=(size, arguments.threads, results))
        process.start()
        texts, queries, seconds, peak, kept = results.get()
        process.join()
        print(f"| {texts} | {queries} | {seconds:.0f} | {texts / seconds:.0f} | {peak:.2f} | {kept:.3f} |", flush=True)


if __name__ == "__main__":
    main()
