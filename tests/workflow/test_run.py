"""The tiny preset from nothing to the table, and what happens when something changes or breaks after that."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import copy_workflow

from cachelora.cli import main

TINY = ("--configfile", "config/presets/tiny.yaml")
MODELS = ["base", "medical", "law", "joint", "merge-svd"]


SECRET = "hf_averysecretvalue"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of the workflow in which the tiny preset has run, with a secret in the environment."""
    workflow = copy_workflow(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        result = workflow.run(*TINY)
    assert result.returncode == 0, result.stdout
    assert SECRET not in result.stdout
    return workflow


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished run, to change."""
    shutil.copytree(finished.folder, tmp_path / "copy", symlinks=True)
    return type(finished)(tmp_path / "copy")


def test_the_table_has_every_model_on_every_test_set(finished):
    table = pd.read_csv(finished.folder / "results/tiny/benchmark.csv")
    table = table[table["source"] == "measured"]
    overall = table[(table["kind"] == "all") & (table["metric"] == "margin")]
    assert sorted(zip(overall["test_set"], overall["model"], strict=True)) == sorted(
        (test_set, model) for test_set in ("medical", "law", "general") for model in MODELS
    )
    means = table[table["metric"].isin(["margin", "accuracy", "positive_similarity", "negative_similarity"])]
    assert (means["low"] <= means["value"] + 1e-9).all()
    assert (means["value"] <= means["high"] + 1e-9).all()
    assert (table["low"] <= table["high"]).all()
    assert (table.loc[table["model"] == "base", "change"] == 0).all()
    markdown = (finished.folder / "results/tiny/benchmark.md").read_text()
    assert "## Published against measured" in markdown


def test_results_carry_the_version_of_their_test_set(finished):
    lock = json.loads((finished.folder / "data/lock.json").read_text())
    version = f"v{lock['data/law/test.jsonl']['version']}"
    table = pd.read_csv(finished.folder / "results/tiny/benchmark.csv")
    rows = table[(table["source"] == "measured") & (table["test_set"] == "law")]
    assert set(rows["test_version"]) == {version}
    triplets = len((finished.folder / "data/law/test.jsonl").read_text().splitlines())
    assert (
        f"## law ({triplets} triplets, {version}), base model"
        in (finished.folder / "results/tiny/benchmark.md").read_text()
    )


def test_labelled_pairs_of_every_test_set_are_written(finished):
    pairs = pd.read_parquet(finished.folder / "results/tiny/testset/law.pairs.parquet")
    assert pairs["same_answer"].mean() == pytest.approx(0.5, abs=0.02)
    assert pairs["part"].value_counts(normalize=True)["calibration"] == pytest.approx(0.5, abs=0.05)


def test_the_replay_counts_every_query_at_every_threshold(finished):
    for model in ("base", "joint"):
        place = finished.folder / f"results/tiny/replay/minilm-l6/{model}"
        table, summary = pd.read_parquet(f"{place}.parquet"), json.loads(place.with_suffix(".json").read_text())
        labels = {found["label"] for found in summary["thresholds"]}
        assert labels | {*summary["unmet"]} == {"1 % false hits", "2 % false hits", "5 % false hits", "fixed 0.80"}
        for found in summary["thresholds"]:
            rows = table[table["label"] == found["label"]]
            assert found["hits"] + found["false_hits"] + found["misses"] == found["queries"] == len(rows) == 2000
            assert (rows["outcome"] == "false hit").sum() == found["false_hits"]
            # Whatever the model, the same words hit again.
            assert not (rows["outcome"] == "miss")[rows["form"] == "repeat"].any()
        assert summary["timing"]["encode_ms_p50"] > 0
        pairs = pd.read_parquet(finished.folder / "results/tiny/testset/law.pairs.parquet")
        calibrated = pairs[pairs["part"] == "calibration"]
        assert not {*table["text"]} & {*calibrated["query"], *calibrated["other"]}


def test_every_model_of_the_report_is_measured_as_a_cache_would_be(finished):
    for model in ("base", "joint"):
        table = pd.read_parquet(finished.folder / f"results/tiny/thresholds/minilm-l6/{model}.parquet")
        assert set(table["test_set"]) == {"medical", "law", "general", "all domains"}
        chosen = table[(table["fitted_on"] == "all") & (table["test_set"] == "all domains")]
        assert chosen["budget"].tolist() == [0.01, 0.02, 0.05]
        assert (chosen["false_hit_rate"] <= chosen["hit_ratio"] * 2 + 1e-9).all()


def test_the_table_of_a_cell_is_what_transformers_and_numpy_give(finished, base):
    """Margin, accuracy and AP again, from the model's folder and the test file alone."""
    import torch
    from peft import PeftModel
    from sklearn.metrics import average_precision_score
    from transformers import AutoModel, AutoTokenizer

    from cachelora.models import base_folder

    folder = base_folder(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = pd.read_parquet(finished.folder / "results/tiny/benchmark.parquet")
    table = table[(table["source"] == "measured") & (table["kind"] == "all")]
    for test_set, name in (("law", "base"), ("medical", "joint"), ("law", "merge-svd")):
        network = AutoModel.from_pretrained(folder)
        if name != "base":
            network = PeftModel.from_pretrained(network, finished.folder / f"results/tiny/models/minilm-l6/{name}")
        network.eval()
        lines = (finished.folder / f"data/{test_set}/test.jsonl").read_text(encoding="utf-8").splitlines()

        def embed(text, network=network):
            with torch.no_grad():
                hidden = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
            return (hidden / hidden.norm()).numpy()

        triplets = [[embed(json.loads(line)[key]) for key in ("anchor", "positive", "negative")] for line in lines]
        positive, negative = (np.array([a @ texts[n] for a, *texts in triplets]) for n in (0, 1))
        labels = np.repeat([1, 0], len(triplets))
        expected = {
            "margin": positive.mean() - negative.mean(),
            "accuracy": (positive > negative).mean(),
            "ap": average_precision_score(labels, np.concatenate([positive, negative])),
        }
        found = table[(table["test_set"] == test_set) & (table["model"] == name)].set_index("metric")["value"]
        for metric, value in expected.items():
            assert found[metric] == pytest.approx(value, abs=1e-4), (test_set, name, metric)


def test_the_report_needs_nothing_else_and_the_figures_lie_beside_it(finished):
    page = (finished.folder / "results/tiny/benchmark.html").read_text(encoding="utf-8")
    assert "<script" not in page
    # The names of namespaces in the drawings, and links within the page.
    addresses = set(re.findall(r'(?:src|href)="([^"#]*)', page)) - {"", "data:,"}
    assert not addresses, addresses
    for part in ("What to take", "Worst false hits", "From queries to triplets", "Made by", "GPU-seconds"):
        assert part in page
    figures = {path.stem for path in (finished.folder / "results/tiny/figures/minilm-l6").glob("*.svg")}
    assert figures == {"kinds", "precision", "similarities", "trainings", "frontier", "replay"}
    assert page.count("<svg") == len(figures)


def test_the_terminal_shows_the_overviews(finished, capsys):
    assert main(["table", str(finished.folder / "results/tiny/benchmark.parquet")]) == 0
    shown = capsys.readouterr().out
    assert "Margin by test set, base model minilm-l6" in shown
    assert "benchmark.html" in shown
    assert "\x1b" not in shown
    assert main(["table", str(finished.folder / "results/tiny/benchmark.csv")]) == 1
    assert "it is no benchmark table" in capsys.readouterr().err


def test_training_changed_the_models(finished):
    table = pd.read_csv(finished.folder / "results/tiny/benchmark.csv")
    table = table[table["source"] == "measured"]
    changes = table[(table["metric"] == "margin") & (table["kind"] == "all") & (table["model"] != "base")]["change"]
    assert (changes != 0).all()


def test_the_deployed_model_gives_the_numbers_of_the_table(finished):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(finished.folder / "results/tiny/deploy/minilm-l6/joint"))
    tests = [json.loads(line) for line in (finished.folder / "data/law/test.jsonl").read_text().splitlines()]
    anchor, positive, negative = (
        model.encode([row[name] for row in tests], normalize_embeddings=True)
        for name in ("anchor", "positive", "negative")
    )
    margins = (anchor * positive).sum(axis=1) - (anchor * negative).sum(axis=1)
    table = pd.read_csv(finished.folder / "results/tiny/benchmark.csv")
    row = table[(table["model"] == "joint") & (table["test_set"] == "law") & (table["kind"] == "all")]
    assert float(row[row["metric"] == "margin"]["value"].iloc[0]) == pytest.approx(margins.mean(), abs=1e-5)
    assert float(row[row["metric"] == "accuracy"]["value"].iloc[0]) == pytest.approx(np.mean(margins > 0))


def test_no_secret_of_the_environment_reaches_a_file(finished):
    for path in finished.folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_nothing_is_to_be_done_after_a_run(finished):
    assert finished.planned(*TINY) == set()


def test_changing_one_domains_queries_reruns_its_chain_only(again):
    again.edit(
        "data/law/queries.jsonl", lambda text: text + text.splitlines()[0].upper().replace("QUERY", "query") + "\n"
    )
    planned = again.planned(*TINY)
    assert planned == {
        "Reading, grouping and splitting the queries of law.",
        "Replaying the recorded augmentation of law, shard 0.",
        "Replaying the recorded augmentation of law, shard 1.",
        "Gathering the shards of law.",
        "Filtering what was written for law.",
        "Grouping the triplets of law.",
        "Training the adapter law on minilm-l6.",
        "Training the adapter joint on minilm-l6.",
        "Merging adapters on minilm-l6 into merge-svd.",
        *(f"Evaluating {model} on minilm-l6." for model in ("law", "joint", "merge-svd")),
        "Merging joint into minilm-l6, for use without peft.",
        "Choosing thresholds for joint on minilm-l6.",
        "Sending a stream of queries through a cache with joint on minilm-l6.",
        "Writing the benchmark table.",
        "Writing the report.",
        "Everything: the benchmark table and the model to deploy, or the table of a sweep.",
    }


def test_a_changed_comment_reruns_nothing(again):
    again.edit("src/cachelora/train/batches.py", lambda text: text + "\n# A comment.\n")
    again.edit("workflow/scripts/queries.py", lambda text: "# A comment.\n" + text)
    assert again.planned(*TINY) == set()


def test_changed_code_reruns_its_stage(again):
    again.edit("src/cachelora/benchmark.py", lambda text: text.replace('"# Benchmark"', '"# The benchmark"'))
    assert again.planned(*TINY) == {
        "Writing the benchmark table.",
        "Writing the report.",
        "Everything: the benchmark table and the model to deploy, or the table of a sweep.",
    }
    again.edit("workflow/scripts/train.py", lambda text: text + "\nchanged = True\n")
    planned = again.planned(*TINY)
    assert {f"Training the adapter {model} on minilm-l6." for model in ("law", "medical", "joint")} <= planned
    assert not any(message.startswith(("Reading", "Replaying", "Grouping")) for message in planned)


def test_a_changed_recipe_reruns_the_training(again):
    planned = again.planned(*TINY, "--config", 'train={"learning_rate": 0.005}')
    assert "Training the adapter law on minilm-l6." in planned
    assert "Grouping the triplets of law." not in planned


def test_a_sweep_compares_its_trials_and_reads_no_test_set(again):
    sweep = {"grid": {"rank": [2, 4]}, "domains": ["law"], "seeds": [1]}
    arguments = (*TINY, "--config", f"sweep={json.dumps(sweep)}")
    assert not any(message.startswith(("Evaluating", "Merging", "Writing")) for message in again.planned(*arguments))
    result = again.run(*arguments)
    assert result.returncode == 0, result.stdout
    folder = again.folder / "results/tiny/sweep"
    table = pd.read_csv(folder / "minilm-l6.csv")
    assert sorted(table["changed"]) == ['{"rank": 2}', '{"rank": 4}']
    choice = yaml.safe_load((folder / "minilm-l6.yaml").read_text())
    assert choice == {"train": json.loads(table["changed"][0])}
    assert again.planned(*arguments) == set()


def test_data_parallel_training_is_asked_for_by_the_config(again):
    changes = ("--config", 'train={"processes": 2}')
    target = "results/tiny/models/minilm-l6/law/metrics.json"
    result = again.run(*TINY, *changes, "--resources", "gpu=2", "--", target)
    assert result.returncode == 0, result.stdout
    metrics = json.loads((again.folder / target).read_text())
    assert metrics["device"]["processes"] == 2
    log = (again.folder / "logs/tiny/train/minilm-l6/law.log").read_text()
    assert log.count("step 0 of") == 1
    assert (again.folder / "results/tiny/training/minilm-l6/law.svg").read_text().startswith("<?xml")
    assert not (again.folder / "results/tiny/state/train/minilm-l6/law").exists()


def test_a_damaged_adapter_is_refused_and_leaves_no_result(again):
    folder = again.folder / "results/tiny/models/minilm-l6/law"
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    (again.folder / "results/tiny/evaluation/minilm-l6/law.json").unlink()
    weights.write_bytes(content[:-5])
    result = again.run(
        *TINY,
        "--rerun-triggers",
        "mtime",
        "--allowed-rules",
        "evaluate",
        "--",
        "results/tiny/evaluation/minilm-l6/law.json",
    )
    assert result.returncode != 0
    assert (
        f"ERROR results/tiny/models/minilm-l6/law/adapter_model.safetensors: its header promises {len(content):,} bytes"
        in result.stdout
    )
    assert not (again.folder / "results/tiny/evaluation/minilm-l6/law.json").exists()
    weights.write_bytes(content)
    assert again.run(*TINY).returncode == 0


def test_a_domain_that_is_added_trains_none_of_the_others_again(again):
    """By a merge and by going on from joint; and a hybrid that sends queries to all of them."""
    law = [json.loads(line) for line in (again.folder / "data/law/augmented.jsonl").read_text().splitlines()]
    trained_on = set(pd.read_parquet(again.folder / "results/tiny/triplets/law.parquet")["positive"])
    known = next(record for record in law if record["query"] in trained_on)
    test = again.folder / "mind-test.jsonl"
    leak = {"anchor": known["query"].upper(), "positive": "a b c", "negative": "d e f", "kind": "topic"}
    test.write_text((again.folder / "data/psychology/test.jsonl").read_text() + json.dumps(leak) + "\n")
    added = {
        "domains": {
            "mind": {
                "queries": "data/psychology/queries.jsonl",
                "recording": "data/psychology/augmented.jsonl",
                "test": test.name,
                "added": True,
            }
        },
        "models": {"joint-and-mind": {"start": "joint", "domains": ["mind"], "replay": 0.5}},
        "merges": {"merge-both": {"method": "ties", "models": ["joint", "mind"], "weights": {"joint": 1.0}}},
        "hybrids": {"hybrid": {"reject": 0.4}},
    }
    (again.folder / "added.yaml").write_text(yaml.safe_dump(added))
    arguments = (*TINY, "added.yaml")
    planned = again.planned(*arguments)
    assert {message for message in planned if message.startswith(("Training", "Grouping", "Replaying"))} == {
        "Training the adapter mind on minilm-l6.",
        "Training the adapter joint-and-mind on minilm-l6.",
        "Grouping the triplets of mind.",
        "Replaying the recorded augmentation of mind, shard 0.",
        "Replaying the recorded augmentation of mind, shard 1.",
    }
    before = {path: path.read_bytes() for path in (again.folder / "results/tiny/models").rglob("adapter_model*")}
    assert {f"Evaluating {model} on minilm-l6." for model in ("mind", "joint-and-mind", "merge-both")} <= planned
    models = again.folder / "results/tiny/models/minilm-l6"
    evaluation = again.folder / "results/tiny/evaluation/minilm-l6/hybrid.json"
    # The rest of the table takes as long again.
    files = [models / "joint-and-mind/metrics.json", models / "merge-both/metrics.json", evaluation]
    result = again.run(*arguments, "--", *(str(path.relative_to(again.folder)) for path in files))
    assert result.returncode == 0, result.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not any(message.startswith(("Training", "Grouping")) for message in again.planned(*arguments))
    evaluated = json.loads(evaluation.read_text())
    versions = {row["test_set"]: row["test_version"] for row in evaluated["results"]}
    assert set(versions) == {"medical", "law", "general", "mind"}
    assert [name for name, version in versions.items() if version.endswith(" less 1")] == ["mind"]
    rejects = (again.folder / "results/tiny/testset/mind.rejects.jsonl").read_text()
    assert "a training group of law holds a text of it" in rejects and rejects.count("\n") == 1
    chosen = json.loads((models / "merge-both/metrics.json").read_text())
    assert chosen["weights"] == {"joint": 1.0, "mind": 0.5}
    detector = json.loads((models / "hybrid/metrics.json").read_text())
    assert set(detector["validation"]) == {"medical", "law", "general", "mind"}
    routed = evaluated["routed"]
    assert {model for found in routed.values() for model in found} <= {"joint", "medical", "law", "mind"}
    assert routed["mind"]["mind"] > sum(routed["mind"].values()) / 2


def test_a_training_group_that_stands_in_a_test_set_is_dropped_and_counted(workflow):
    recorded = [json.loads(line) for line in (workflow.folder / "data/law/augmented.jsonl").read_text().splitlines()]
    leaks = [
        {"anchor": recorded[0]["query"] + " ?", "positive": "a b c d", "negative": "e f g h", "kind": "topic"},
        {
            "anchor": "i j k l",
            "positive": "m n o p",
            "negative": recorded[1]["paraphrases"][0].upper(),
            "kind": "topic",
        },
    ]
    for domain in ("law", "medical"):
        known = (workflow.folder / f"data/{domain}/augmented.jsonl").read_text().splitlines()[:80]
        queries = [json.dumps({"query": json.loads(line)["query"]}) + "\n" for line in known]
        (workflow.folder / f"data/{domain}/queries.jsonl").write_text("".join(queries))
    # The law's training texts in another domain's test set: the joint model would be tested on them.
    test = workflow.folder / "mine.jsonl"
    test.write_text((workflow.folder / "data/medical/test.jsonl").read_text())
    workflow.edit("config/domains.yaml", lambda text: text.replace("data/medical/test.jsonl", "mine.jsonl"))
    target, detector = "results/triplets/law.parquet", "results/models/minilm-l6/h/metrics.json"
    two = "domains: {programming: null, psychology: null, general: null}\nhybrids: {h: {}}\n"
    (workflow.folder / "two.yaml").write_text(two)
    arguments = ("--configfile", "two.yaml", "--", target, detector)

    def seen_by_the_detector():
        return json.loads((workflow.folder / detector).read_text())["queries"]["law"]

    result = workflow.run(*arguments)
    assert result.returncode == 0, result.stdout
    before, queries = pd.read_parquet(workflow.folder / target), seen_by_the_detector()
    test.write_text(test.read_text() + "\n".join(map(json.dumps, leaks)) + "\n")
    assert workflow.run(*arguments).returncode == 0
    after = pd.read_parquet(workflow.folder / target)
    in_training = set(before.loc[before["split"] == "train", "group"]) - set(after["group"])
    assert in_training and seen_by_the_detector() == queries - len(in_training)
    assert set(before["positive"]) - set(after["positive"]) == {recorded[0]["query"], recorded[1]["query"]}
    card = (workflow.folder / "results/triplets/law.md").read_text()
    assert int(re.search(r"holds a test text or a near copy of one \| (\d+) \|", card)[1]) >= 2


def test_a_changed_frozen_test_set_is_refused(workflow):
    workflow.edit("data/law/test.jsonl", lambda text: text.replace("adverse possession", "adverse  possession"))
    result = workflow.run("results/testset/law.parquet")
    assert result.returncode != 0
    assert "ERROR data/law/test.jsonl: it is not the version" in result.stdout
    assert not (workflow.folder / "results/testset/law.parquet").exists()


def test_a_domain_of_ones_own_from_a_text_file_without_a_test_file(workflow):
    """A user's log as text, augmented by a recording, tested on its own held-out groups."""
    recorded = [json.loads(line) for line in (workflow.folder / "data/law/augmented.jsonl").read_text().splitlines()][
        :20
    ]
    (workflow.folder / "log.txt").write_text("\n".join(record["query"] for record in recorded))
    workflow.edit(
        "config/domains.yaml",
        lambda text: text.replace(
            "domains:\n", "domains:\n  mine: {queries: log.txt, recording: data/law/augmented.jsonl}\n", 1
        ),
    )
    result = workflow.run("results/testset/mine.parquet", "results/triplets/mine.parquet")
    assert result.returncode == 0, result.stdout
    testset = pd.read_parquet(workflow.folder / "results/testset/mine.parquet")
    triplets = pd.read_parquet(workflow.folder / "results/triplets/mine.parquet")
    assert testset["group"].nunique() == 3
    assert not set(testset["group"]) & set(triplets["group"])
    assert triplets.groupby("split")["group"].nunique().to_dict() == {"train": 14, "validation": 3}
