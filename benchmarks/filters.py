"""What the filters and the judge are worth on the output of a small LLM. See docs/filters.md.

    python benchmarks/filters.py measure      precision and recall of each filter and of all, against readers' verdicts
    python benchmarks/filters.py train        validation margin and AP after training on what they leave, three seeds

The small LLM's output for 160 queries of two shipped domains, the verdicts of readers who saw neither role nor filter,
and the verdicts of the small LLM as its own judge lie in benchmarks/noisy/.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sentence_transformers import SentenceTransformer
from tabulate import tabulate

from cachelora.augment.recorded import Recorded
from cachelora.augment.shard import Shard, shard_queries
from cachelora.config import Augment, Config, Filter, read_config
from cachelora.files import write_table
from cachelora.filter import filter_texts
from cachelora.filter.reasons import REASONS
from cachelora.judge import Verdicts, pairs_to_judge, replay
from cachelora.manifest import write_manifest
from cachelora.metrics import average_precision, distributions, interval, margin, pairs_of_triplets
from cachelora.models import load_model, score_triplets
from cachelora.queries import group_queries, read_queries, split_groups
from cachelora.schemas import PARAPHRASE, TRIPLETS, role_of
from cachelora.testset import read_testset
from cachelora.train import Training, train_model
from cachelora.train.validation import read_validation
from cachelora.triplets import JUDGE, drop_test_copies, kept_texts, make_groups, make_triplets

NOISY = Path(__file__).parent / "noisy"
DOMAINS = ("medical", "programming")
SEEDS = (13, 14, 15)
RESAMPLES = 2000
RIGHT = {PARAPHRASE: "same", "negative": "different"}


def augmented(queries: pd.DataFrame, recording: Path | str) -> pd.DataFrame:
    """Replay a recording, whatever share of it failed."""
    settings = Augment(max_failed_share=1)
    asked = shard_queries(queries, 0, 1)
    shard = Shard(asked, settings, str(recording), "")
    for reply in Recorded(recording, 1.0).replies(asked):
        shard.add(reply)
    return shard.table()


def noisy_queries(queries: pd.DataFrame, domain: str) -> pd.DataFrame:
    """Choose the queries that the small LLM was asked."""
    lines = (NOISY / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {json.loads(line)["query"] for line in lines}
    return queries[queries["query"].isin(asked)]


def judged(queries: pd.DataFrame, texts: pd.DataFrame, domain: str) -> pd.DataFrame:
    """Add the small LLM's own verdicts."""
    verdicts = Verdicts(pairs_to_judge(queries, texts, 0, 1), 1.0, domain)
    replay(NOISY / f"{domain}.verdicts.jsonl", verdicts, 1.0)
    return kept_texts(texts, verdicts.table())


def read_all(config: Config) -> dict[str, pd.DataFrame]:
    """Read the queries of the domains, with their splits."""
    found = {}
    for domain in DOMAINS:
        path = config.domains[domain].queries
        asked, _ = read_queries(path, config.queries)
        found[domain] = split_groups(group_queries(asked), config.queries, config.seed, False, path)
    return found


def reviewed(texts: pd.DataFrame, queries: pd.DataFrame, domain: str) -> pd.DataFrame:
    """Put the readers' verdicts beside the texts."""
    lines = (NOISY / f"{domain}.review.jsonl").read_text(encoding="utf-8").splitlines()
    verdict = {(row["query"], row["text"]): row["verdict"] for row in map(json.loads, lines)}
    name = dict(zip(queries["query_id"], queries["query"], strict=True))
    said = [verdict.get((name[row.query_id], row.text)) for row in texts.itertuples()]
    table = texts.assign(said=said, role=texts["kind"].map(role_of))
    return table[table["said"].notna()].assign(right=lambda rows: rows["said"] == rows["role"].map(RIGHT))


def share(part: int, whole: int) -> str:
    """Return a share with its 95 % interval (Wilson 1927)."""
    if not whole:
        return "-"
    bounds = binomtest(part, whole).proportion_ci(method="wilson")
    return f"{part / whole:.2f} [{bounds.low:.2f}, {bounds.high:.2f}]"


def measure(config: Config, model: SentenceTransformer) -> None:
    """Print precision and recall of the filters and of the judge."""
    queries, parts = read_all(config), []
    for domain in DOMAINS:
        asked = noisy_queries(queries[domain], domain)
        texts = filter_texts(asked, augmented(asked, NOISY / f"{domain}.jsonl"), config.filter, model, bfloat16=False)
        parts.append(reviewed(judged(asked, texts, domain), asked, domain))
    table = pd.concat(parts)
    for role in (PARAPHRASE, "negative"):
        mine = table[table["role"] == role]
        wrong = int((~mine["right"]).sum())
        print(f"\n{len(mine)} {role}s, {wrong} of them wrong\n")
        rows = []
        names = [*REASONS, "all filters", JUDGE, "all filters and judge"]
        for name in names:
            counted = {"all filters": {*REASONS}, "all filters and judge": {*REASONS, JUDGE}}.get(name, {name})
            hit = mine["reasons"].map(lambda found, counted=counted: bool(counted & {*found})).astype(bool)
            dropped, left = mine[hit], mine[~hit]
            caught = int((~dropped["right"]).sum())
            if len(dropped):
                right = share(int(left["right"].sum()), len(left))
                rows.append((name, len(dropped), share(caught, len(dropped)), share(caught, wrong), right))
        print(tabulate(rows, ["filter", "dropped", "precision", "recall", "right among the rest"], tablefmt="github"))


def arms(config: Config) -> dict[str, tuple[Filter, bool, str]]:
    """Return for each arm the filter's settings, whether the judge counts, and the recording."""
    default = config.filter
    off = default.filters.model_copy(update=dict.fromkeys(type(default.filters).model_fields) | {"statement": False})
    raw = default.model_copy(update={"filters": off})
    return {
        "raw": (raw, False, "noisy"),
        "filtered": (default, False, "noisy"),
        "filtered, judged": (default, True, "noisy"),
        "filtered, rule-made": (default.model_copy(update={"rule_made": 2}), False, "noisy"),
        "filtered, mined": (default.model_copy(update={"mined": 2}), False, "noisy"),
        "recorded, raw": (raw, False, "recorded"),
        "recorded, filtered": (default, False, "recorded"),
    }


def triplets_of(config: Config, model: SentenceTransformer, folder: Path) -> dict[str, dict[str, str]]:
    """Write the triplets of each arm: what it trains on, and the recorded corpora's validation split for all."""
    queries, found = read_all(config), {}
    testsets = [read_testset(domain.test, 1.0, "")[0] for domain in config.domains.values() if domain.test]
    for arm, (settings, with_judge, source) in arms(config).items():
        found[arm] = {}
        for domain in DOMAINS:
            every = queries[domain]
            asked = noisy_queries(every, domain)
            recording = NOISY / f"{domain}.jsonl" if source == "noisy" else config.domains[domain].recording
            texts = filter_texts(asked, augmented(asked, recording), settings, model, bfloat16=False)
            texts = judged(asked, texts, domain) if with_judge else texts
            held = every[every["split"] == "validation"]
            good = filter_texts(held, augmented(held, config.domains[domain].recording), config.filter, model, False)
            groups = [*make_groups(asked, texts)[0], *make_groups(held, good)[0]]
            groups, _ = drop_test_copies(groups, testsets, config.triplets.near_copy)
            table = make_triplets(groups, "group", Counter(), domain)
            path = folder / arm.replace(", ", "-") / f"{domain}.parquet"
            path.parent.mkdir(exist_ok=True)
            write_table(path, table, TRIPLETS)
            train = table[table["split"] == "train"].drop_duplicates("group")
            print(f"{arm}, {domain}: {len(train)} groups, {train['negatives'].map(len).sum()} negatives", flush=True)
            found[arm][domain] = str(path)
    return found


def train(config: Config, base: str, model: SentenceTransformer, only: list[str]) -> None:
    """Train the arms and print what they are worth on the validation split."""
    source, settings = config.base_models[base], config.train
    with tempfile.TemporaryDirectory() as name:
        folder, scores = Path(name), {}
        paths = {arm: files for arm, files in triplets_of(config, model, folder).items() if not only or arm in only}
        for arm, files in paths.items():
            for seed in SEEDS:
                out = folder / f"{arm}-{seed}"
                training = Training(
                    base=source, triplets=files, settings=settings, seed=seed, folder=str(out), state=f"{out}-state",
                    threads=2, code="", start=None, replayed={},
                )  # fmt: skip
                started = time.monotonic()
                train_model(training)
                write_manifest(out, {"arm": arm}, files.values(), started)
                trained = load_model(source, out)
                scores[arm, seed] = scores_of(trained, files)
                print(f"{arm}, seed {seed}: {summary(scores[arm, seed])}", flush=True)
        scores["base", 0] = scores_of(model, files)
        print(arm_table(scores))


def scores_of(model: SentenceTransformer, files: dict[str, str]) -> dict[str, pd.DataFrame]:
    """Score the validation triplets of each domain."""
    return {domain: score_triplets(model, read_validation(path, 10_000), 64) for domain, path in files.items()}


def summary(scores: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Return the mean margin and AP over the domains."""
    return {
        name: float(np.mean([metric[domain] for domain in scores])) for name, metric in resampled(scores, 1).items()
    }


def resampled(scores: dict[str, pd.DataFrame], draws: int) -> dict[str, dict[str, Any]]:
    """Return margin and AP of each domain, in each of so many draws of the groups; the first draw is all of them."""
    found: dict[str, dict[str, Any]] = {"margin": {}, "AP": {}}
    for domain, table in scores.items():
        pair = table["positive_similarity"].to_numpy(), table["negative_similarity"].to_numpy()
        metrics = {"margin": margin, "AP": average_precision}
        drawn = distributions(pairs_of_triplets(*pair, table["group"]), metrics, draws - 1, SEEDS[0])
        found["margin"][domain], found["AP"][domain] = drawn["margin"], drawn["AP"]
    return found


def arm_table(scores: dict[tuple[str, int], dict[str, pd.DataFrame]]) -> str:
    """Write the arms side by side: the mean of the seeds, and the change from the raw output."""
    drawn = {key: resampled(found, RESAMPLES) for key, found in scores.items()}
    rows = []
    names = list(dict.fromkeys(arm for arm, _ in scores))

    def mean(arm: str, metric: str) -> tuple[np.ndarray, list[float]]:
        """Return the mean over seeds and domains in each draw, and each seed's value."""
        each = [
            np.mean([found[metric][domain] for domain in DOMAINS], axis=0)
            for (a, _), found in drawn.items()
            if a == arm
        ]
        return np.mean(each, axis=0), [float(values[0]) for values in each]

    for arm in names:
        row = [arm]
        for metric in ("margin", "AP"):
            values, seeds = mean(arm, metric)
            reference, _ = mean("recorded, raw" if arm.startswith("recorded") else "raw", metric)
            low, high = interval(values, 0.95, corrected=metric == "AP")
            row.append(f"{values[0]:.3f} [{low:.3f}, {high:.3f}]")
            row.append(f"{min(seeds):.3f} to {max(seeds):.3f}")
            low, high = interval(values - reference, 0.95)
            row.append(f"{values[0] - reference[0]:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append(row)
    head = ["trained on", "margin", "seeds", "change from raw", "AP", "seeds", "change from raw"]
    return "\n" + tabulate(rows, head, tablefmt="github")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "train"])
    parser.add_argument("--only", nargs="*", default=[], help="arms to train; default: all")
    arguments = parser.parse_args()
    config = read_config("config/domains.yaml")
    base = config.filter_base_model
    model = load_model(config.base_models[base], None)
    if arguments.what == "measure":
        measure(config, model)
    else:
        train(config, base, model, arguments.only)


if __name__ == "__main__":
    main()
