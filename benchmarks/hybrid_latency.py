"""What a query costs with a hybrid: a second encoding, and the detector.

    python benchmarks/hybrid_latency.py results/models/minilm-l6/hybrid results/testset/*.parquet

takes the anchors of test sets one by one, as a cache does, in turns with one adapter for all of them.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cachelora.config import BaseModelSource, Hybrid
from cachelora.hybrid import read_detector, routes
from cachelora.manifest import hardware, verify
from cachelora.models import load_model


def main() -> None:
    """Print milliseconds a query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hybrid", type=Path, help="folder of a hybrid; the adapters lie beside it")
    parser.add_argument("testset", nargs="+", help="results/testset/{domain}.parquet")
    parser.add_argument("--queries", type=int, default=200, help="anchors drawn, at most")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    made = verify(arguments.hybrid)["config"]
    base = BaseModelSource(**made["base"])
    detector, settings = read_detector(base, arguments.hybrid), Hybrid(**made["hybrid"])
    names = {"base", settings.otherwise, *made["models"].values()}
    loaded = {name: load_model(base, None if name == "base" else arguments.hybrid.parent / name) for name in names}

    def encode(text: str, name: str) -> np.ndarray:
        return loaded[name].encode([text], normalize_embeddings=True)

    anchors = pd.concat([pd.read_parquet(path) for path in arguments.testset])["anchor"].drop_duplicates()
    texts = anchors.sample(min(arguments.queries, len(anchors)), random_state=1).tolist()
    took: dict[str, list[float]] = {f"{settings.otherwise} alone": [], "hybrid": [], "of it the detector": []}
    for text in texts[:20] + texts:
        started = time.perf_counter()
        encode(text, settings.otherwise)
        alone = time.perf_counter()
        said = detector.probabilities(encode(text, "base"))
        detected = time.perf_counter()
        encode(text, routes(said, detector, settings, made["models"])[0])
        ended = time.perf_counter()
        for name, seconds in zip(took, (alone - started, ended - alone, detected - alone), strict=True):
            took[name].append(1000 * seconds)
    machine = hardware()
    print(f"{len(texts)} queries one by one, {arguments.threads} threads of {machine['processor']}\n")
    print("| | median, ms | 95 % |\n|---|---|---|")
    for name, milliseconds in took.items():
        # The first ones warm up.
        print(f"| {name} | {np.median(milliseconds[20:]):.1f} | {np.quantile(milliseconds[20:], 0.95):.1f} |")


if __name__ == "__main__":
    main()
