"""How well a hybrid's detector knows queries from elsewhere, and how honest its probabilities are.

    python benchmarks/detector.py results/models/minilm-l6/hybrid medical=queries.jsonl law=more.csv ...

prints a line for each file: a share of its queries, at most so many, whose domain is the one named.
"""

import argparse
from pathlib import Path

import numpy as np

from cachelora.config import BaseModelSource, Hybrid, Queries
from cachelora.hybrid import calibration_error, detector_metrics, read_detector
from cachelora.manifest import verify
from cachelora.models import encode_texts, load_model
from cachelora.queries import read_queries


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hybrid", type=Path, help="folder of a hybrid")
    parser.add_argument("file", nargs="+", help="domain=file")
    parser.add_argument("--queries", type=int, default=500, help="queries drawn of a file, at most")
    arguments = parser.parse_args()
    made = verify(arguments.hybrid)["config"]
    base = BaseModelSource(**made["base"])
    detector, reject = read_detector(base, arguments.hybrid), Hybrid(**made["hybrid"]).reject
    model = load_model(base, None)
    print("| file | queries | accuracy | mean probability | assigned | assigned wrongly | calibration error |")
    print("|---|---|---|---|---|---|---|")
    for named in arguments.file:
        domain, _, path = named.partition("=")
        queries, _ = read_queries(path, Queries(max_reject_share=1.0))
        texts = sorted(set(queries))
        chosen = np.random.default_rng(1).permutation(len(texts))[: arguments.queries]
        vectors = encode_texts(model, [texts[number] for number in chosen], 64)
        said, label = detector.probabilities(np.array([*vectors.values()])), detector.domains.index(domain)
        found, error = detector_metrics(said, label, reject), calibration_error(said, np.full(len(said), label))
        print(
            f"| {Path(path).stem} | {found['n']} | {found['accuracy']:.2f} | {found['confidence']:.2f} "
            f"| {found['assigned']:.2f} | {found['assigned_wrong']:.2f} | {error:.2f} |"
        )


if __name__ == "__main__":
    main()
