"""Training by its effect on held-out data; merging and deploying by the embeddings that come out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from cachelora.config import Merge, Train
from cachelora.deploy import deploy_model
from cachelora.errors import DamagedError, ModelError, TrainingError
from cachelora.files import write_table
from cachelora.manifest import write_manifest
from cachelora.merge import METHODS, merge_adapters
from cachelora.models import base_folder, encode_texts, load_model
from cachelora.schemas import TRIPLETS
from cachelora.train import Training, remove_checkpoints, train_model
from cachelora.train.batches import read_items
from cachelora.train.trainer import GroupLoss, GroupTrainer
from cachelora.train.validation import TIE, Validation, best_of, in_the_running, objective, read_validation

PROBES = ["symptoms of gout", "how do I turn off 2FA?", "notice period for a lodger", "difference between CBT and ACT"]
# What the base model gets wrong and a few steps can teach: the negative repeats the words, the positive does not.
TOPICS = ["wifi", "bluetooth", "location", "roaming", "dark mode", "captions", "backup", "autofill", "sync", "cookies",
          "tracking", "haptics", "vibration", "mirroring", "airplane mode", "narrator"]  # fmt: skip


def toy_triplets(seed=0):
    rows = []
    for number, topic in enumerate(TOPICS):
        negatives = [{"kind": "polarity", "text": f"how to disable {topic}", "source": "llm"}]
        split = "validation" if number % 4 == seed % 4 else "train"
        rows.append((f"activate {topic} for me", f"how to enable {topic}", negatives, topic, split))
    return pd.DataFrame(rows, columns=TRIPLETS.names)


RECIPE = Train(rank=4, alpha=8, learning_rate=2e-3, epochs=4, batch_size=6, precision="float32")


def train(base, folder, recipe=RECIPE, triplets=None):
    started = time.monotonic()
    folder.mkdir(exist_ok=True)
    table = folder.parent / f"{folder.name}.parquet"
    write_table(table, toy_triplets() if triplets is None else triplets, TRIPLETS)
    training = Training(base, {"toy": str(table)}, recipe, 3, str(folder), str(folder.parent / f"{folder.name}.state"))
    metrics = train_model(training)
    write_manifest(folder, {}, [], started)
    remove_checkpoints(training.state)
    return load_model(base, folder), metrics


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, metrics = train(base, folder)
    return model, metrics, folder


@pytest.fixture(scope="module")
def other_adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    train(base, folder, RECIPE.model_copy(update={"epochs": 1}), toy_triplets(1))
    return folder


def embeddings(model):
    vectors = encode_texts(model, PROBES, 8)
    return np.stack([vectors[text] for text in PROBES])


def test_training_improves_held_out_triplets(trained):
    _, metrics, _ = trained
    before, after = metrics["validation"][0], metrics["validation"][-1]
    best = next(row for row in metrics["validation"] if row["step"] == metrics["best_step"])
    assert before["step"] == 0
    assert best["margin"] > before["margin"] + 0.1
    assert best["ap"] >= max(row["ap"] for row in metrics["validation"][1:])
    assert after["step"] == metrics["steps"]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in metrics["log"])
    assert metrics["validation"][0]["domains"]["toy"]["ap"] == before["ap"]
    assert metrics["device"]["type"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_saved_adapter_is_the_trained_one_also_for_plain_peft(base, trained):
    model, metrics, folder = trained
    # It is stored in float16, validated in float32.
    found = Validation({"toy": read_validation(folder.parent / f"{folder.name}.parquet", 100)}, bfloat16=False)(model)
    kept = next(row for row in metrics["validation"] if row["step"] == metrics["best_step"])
    assert found["margin"] == pytest.approx(kept["margin"], abs=1e-4)
    expected = embeddings(model)
    np.testing.assert_allclose(embeddings(load_model(base, folder)), expected, atol=1e-6)
    plain = SentenceTransformer(str(base_folder(base)))
    plain[0].auto_model = PeftModel.from_pretrained(plain[0].auto_model, str(folder))
    np.testing.assert_allclose(embeddings(plain), expected, atol=1e-6)
    assert not np.allclose(embeddings(load_model(base, None)), expected, atol=1e-2)
    assert {parameter.dtype for parameter in plain[0].auto_model.parameters()} == {torch.float32}


def test_the_default_adapter_takes_at_most_600_kb(base, tmp_path):
    train(base, tmp_path / "m", Train(epochs=1, batch_size=6, precision="float32"))
    assert (tmp_path / "m" / "adapter_model.safetensors").stat().st_size <= 600_000


def test_the_adapter_names_its_base_and_no_path_of_this_machine(trained, base):
    text = (trained[2] / "adapter_config.json").read_text()
    assert f'"base_model_name_or_path": "{base.name}"' in text
    assert "site-packages" not in text
    assert str(trained[2]) not in text


def test_the_best_checkpoint_is_kept_not_the_last(base, tmp_path):
    # So high a rate that later steps undo what earlier ones did.
    recipe = RECIPE.model_copy(update={"learning_rate": 0.05, "epochs": 6, "schedule": "constant"})
    model, metrics = train(base, tmp_path / "m", recipe)
    found = Validation({"toy": read_validation(tmp_path / "m.parquet", 100)}, bfloat16=False)(model)
    first = metrics["validation"][0]
    rows = {row["step"]: row for row in metrics["validation"][1:]}
    scores = {step: objective(row, first, recipe.most_lost_similarity) for step, row in rows.items()}
    best = rows[best_of(scores)]
    assert metrics["best_step"] == best["step"] < max(rows)
    assert found["ap"] == pytest.approx(best["ap"])
    assert found["margin"] == pytest.approx(best["margin"], abs=1e-4)


def test_what_loses_too_much_positive_similarity_comes_last():
    base = {"ap": 0.5, "p_chr_auc": 0.5, "margin": 0.0, "positive_similarity": 0.7}
    good = {"ap": 0.6, "p_chr_auc": 0.5, "margin": 0.1, "positive_similarity": 0.66}
    better = good | {"ap": 0.9, "positive_similarity": 0.6}
    assert objective(good, base, 0.05) > objective(better, base, 0.05) < objective(base, base, 0.05)
    assert objective(better, base, 0.2) > objective(good, base, 0.2)
    assert objective(good | {"margin": 0.2}, base, 0.05) > objective(good, base, 0.05)


def test_the_larger_margin_decides_where_validation_cannot():
    """The two epochs of a real training, of which the first was kept for three ten-thousandths."""
    first, second = (0.0, 0.66054, 0.1263), (0.0, 0.66027, 0.1606)
    assert best_of({222: first, 444: second}) == 444
    assert best_of({222: first, 444: (0.0, 0.66054 - 1.5 * TIE, 0.1606)}) == 222
    assert best_of({222: first, 444: (-0.01, 0.66027, 0.1606)}) == 222


@given(st.lists(st.tuples(st.sampled_from([0.0, -0.01]), st.sampled_from([0.6, 0.601, 0.603, 0.7]), st.floats(0, 1))))
def test_what_was_dropped_on_the_way_is_not_the_best_in_the_end(scores):
    kept = {}
    for step, score in enumerate(scores):
        kept = in_the_running(kept | {step: score})
        assert best_of(kept) == best_of(dict(enumerate(scores[: step + 1])))


def test_training_is_seeded(base, trained, tmp_path):
    train(base, tmp_path / "again")
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", trained[2]))
    assert again.keys() == first.keys()
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_groups(base, tmp_path):
    recipe = RECIPE.model_copy(update={"learning_rate": 1e30, "warmup_share": 0.0, "max_grad_norm": 1e30})
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+ \(groups toy \w.*\)\. Lower train\.learning"):
        train(base, tmp_path / "m", recipe)
    assert not (tmp_path / "m" / "adapter_model.safetensors").exists()


def test_all_weights_can_be_trained_as_a_control(base, tmp_path):
    recipe = RECIPE.model_copy(update={"full": True, "learning_rate": 5e-5, "epochs": 2})
    model, metrics = train(base, tmp_path / "full", recipe)
    assert metrics["validation"][-1]["margin"] > metrics["validation"][0]["margin"]
    found = Validation({"toy": read_validation(tmp_path / "full.parquet", 100)}, bfloat16=False)(model)
    best = next(row for row in metrics["validation"] if row["step"] == metrics["best_step"])
    assert found["margin"] == pytest.approx(best["margin"], abs=1e-6)
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"model.safetensors", "manifest.json"}


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "losses": {"ranking": 1.0, "distillation": 10.0}, "mini_batch_size": 5},
        {"losses": {"cosent": 1.0}},
        {"losses": {"ranking": 1.0, "bce": 0.5}, "guided": True},
        {"losses": {"ranking": 1.0, "online_contrastive": 1.0}, "hardness": 5.0, "calibration": 3.0},
        {"grouped": False},
    ],
    ids=str,
)
def test_every_loss_and_option_teaches_the_toy_task(base, tmp_path, change):
    _, metrics = train(base, tmp_path / "m", RECIPE.model_copy(update={"epochs": 2, **change}))
    assert metrics["validation"][-1]["margin"] > metrics["validation"][0]["margin"]


def test_two_processes_agree_with_one(base, trained, tmp_path):
    """The stated tolerance: weights to 2e-4 after eight steps, embeddings to 1e-3."""
    model, metrics = train(base, tmp_path / "two", RECIPE.model_copy(update={"processes": 2}))
    assert metrics["device"]["processes"] == 2
    assert [row["step"] for row in metrics["log"]] == [row["step"] for row in trained[1]["log"]]
    np.testing.assert_allclose(
        [row["loss"] for row in metrics["log"]], [row["loss"] for row in trained[1]["log"]], rtol=1e-3
    )
    two, one = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "two", trained[2]))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4)
    np.testing.assert_allclose(embeddings(model), embeddings(trained[0]), atol=1e-3)


def test_gradcache_gives_the_same_weights(base, trained, tmp_path):
    train(base, tmp_path / "cached", RECIPE.model_copy(update={"mini_batch_size": 5}))
    cached, plain = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "cached", trained[2]))
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=2e-4)


def test_out_of_memory_halves_the_texts_at_once_and_training_goes_on(base, trained, tmp_path, monkeypatch, caplog):
    # A stand-in for a GPU that holds the activations of four texts.
    whole = GroupLoss.embed_minibatch

    def embed_minibatch(self, sentence_feature, begin, end, **kwargs):
        # Nine fail in the middle of the backward pass, when some gradients are there already.
        full = kwargs["with_grad"] and (end - begin > 9 or (end - begin > 4 and begin > 0))
        if full or not self.uses_gradient_cache:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, sentence_feature, begin, end, **kwargs)

    monkeypatch.setattr(GroupLoss, "embed_minibatch", embed_minibatch)
    _, metrics = train(base, tmp_path / "small")
    assert [f"on {number} texts at once" in caplog.text for number in (18, 9, 4, 2)] == [True, True, True, False]
    np.testing.assert_allclose(
        [row["loss"] for row in metrics["log"]], [row["loss"] for row in trained[1]["log"]], rtol=1e-3
    )


KILLED = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from cachelora.config import BaseModelSource, Train
from cachelora.train import Training, train_model
from cachelora.train.trainer import GroupLoss, GroupTrainer
base, recipe, table, folder, state = sys.argv[1:]
if __name__ == "__main__":
    train_model(Training(
        BaseModelSource.model_validate_json(base), {"toy": table}, Train.model_validate_json(recipe), 3, folder, state
    ))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(base, tmp_path, processes, request):
    kills = request.config.getoption("--kills") if processes == 1 else 1
    recipe = RECIPE.model_copy(update={"epochs": 8 + 8 * kills, "dropout": 0.1, "processes": processes})
    _, metrics = train(base, tmp_path / "whole", recipe)
    steps = metrics["steps"]
    state = tmp_path / "state"
    command = [sys.executable, "-c", KILLED, base.model_dump_json(), recipe.model_dump_json(),
               str(tmp_path / "whole.parquet"), str(tmp_path / "killed"), str(state)]  # fmt: skip

    def last():
        return max((int(path.parent.name[11:]) for path in state.glob("*/checkpoint-*/whole.json")), default=0)

    random = np.random.default_rng()
    for _ in range(kills):
        before = last()
        process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 120
        while last() <= before + 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < last() < steps
    # A checkpoint that was cut off in writing.
    (next(state.glob("*")) / f"checkpoint-{steps - 1}").mkdir()
    kept = last()
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert kept > 2
    assert f"going on from checkpoint-{kept}" in result.stderr
    killed, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("killed", "whole"))
    # Two processes may add up in another order: to the last bit of float16.
    for name, value in whole.items():
        torch.testing.assert_close(killed[name], value, rtol=0 if processes == 1 else 1e-3, atol=1e-6)


def test_checkpoints_of_other_settings_are_not_gone_on_from(base, tmp_path):
    state = tmp_path / "m.state" / "0123456789abcdef" / "checkpoint-1"
    state.mkdir(parents=True)
    (state / "whole.json").write_text("{}")
    _, metrics = train(base, tmp_path / "m", RECIPE.model_copy(update={"epochs": 1}))
    assert metrics["validation"][0]["step"] == 0


def test_what_no_batch_can_be_made_of_is_refused(base, tmp_path):
    one = toy_triplets().iloc[1:2]
    with pytest.raises(TrainingError, match="one group is not enough"):
        train(base, tmp_path / "a", triplets=one)
    with pytest.raises(TrainingError, match="toy has no group to train on"):
        train(base, tmp_path / "b", triplets=one.assign(split="validation"))


def test_a_training_goes_on_from_an_adapter(base, trained, tmp_path):
    started = time.monotonic()
    old, new = tmp_path / "old.parquet", tmp_path / "new.parquet"
    write_table(old, toy_triplets(), TRIPLETS)
    write_table(new, toy_triplets(1).replace("how to enable", "please enable", regex=True), TRIPLETS)
    settings = RECIPE.model_copy(update={"epochs": 1, "learning_rate": 1e-5})
    training = Training(
        base, {"new": str(new), "old": str(old)}, settings, 3, str(tmp_path / "m"), str(tmp_path / "state"),
        start=str(trained[2]), replayed={"old": 0.5},
    )  # fmt: skip
    assert training.key != replace(training, start=None).key != replace(training, replayed={}).key
    metrics = train_model(training)
    write_manifest(tmp_path / "m", {}, [], started)
    # 12 groups of the new domain and 6 of the old.
    assert (metrics["items"], metrics["steps"]) == (24, 3)
    known = Validation({"old": read_validation(old, 500), "new": read_validation(new, 500)}, bfloat16=False)(trained[0])
    assert metrics["validation"][0]["margin"] == pytest.approx(known["margin"], abs=1e-4)
    # So gentle a rate moves it, a little.
    change = np.abs(embeddings(load_model(base, tmp_path / "m")) - embeddings(trained[0])).max()
    assert 1e-6 < change < 1e-2


def test_a_training_does_not_go_on_from_what_does_not_fit(base, trained, tmp_path):
    write_table(tmp_path / "t.parquet", toy_triplets(), TRIPLETS)
    for change, message in (
        ({"rank": 8}, "train.rank: 8, and .* has 4"),
        ({"alpha": 4}, "train.alpha: 4, and .* has 8"),
    ):
        training = Training(
            base, {"toy": str(tmp_path / "t.parquet")}, RECIPE.model_copy(update=change), 3, str(tmp_path / "m"),
            str(tmp_path / "state"), start=str(trained[2]),
        )  # fmt: skip
        with pytest.raises(TrainingError, match=message):
            train_model(training)
    shutil.copytree(trained[2], tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match="safetensors header"):
        train_model(replace(training, settings=RECIPE, start=str(tmp_path / "damaged")))


def test_an_adapter_takes_the_place_of_a_full_fine_tune(base, tmp_path):
    full = RECIPE.model_copy(update={"full": True, "learning_rate": 1e-4, "epochs": 1})
    _, _ = train(base, tmp_path / "m", full)
    assert (tmp_path / "m" / "model.safetensors").exists()
    model, _ = train(base, tmp_path / "m", RECIPE.model_copy(update={"epochs": 1}))
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert model.transformers_model.peft_config
    adapter = tmp_path / "m" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    _, _ = train(base, tmp_path / "m", full)
    assert not adapter.exists()
    adapter.write_bytes(content)
    write_manifest(tmp_path / "m", {}, [], 0.0)
    with pytest.raises(DamagedError, match="it holds an adapter and a full fine-tune"):
        load_model(base, tmp_path / "m")


def test_weights_that_half_precision_cannot_hold_are_not_saved(base, tmp_path):
    with pytest.raises(TrainingError, match=r"not all numbers\. Lower train\.learning_rate|loss is nan"):
        train(base, tmp_path / "m", RECIPE.model_copy(update={"learning_rate": 1e6, "epochs": 1}))
    assert not (tmp_path / "m" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query", "valeu"], r"'valeu' is no linear layer of the base model\. Use some of \['dense', 'key', 'query'"),
        (["word_embeddings"], "'word_embeddings' is no linear layer"),
        (["uery"], r"^train\.target_modules: 'uery' is no linear layer"),
    ],
)
def test_a_mistyped_layer_is_refused(base, tmp_path, targets, message):
    with pytest.raises(TrainingError, match=message):
        train(base, tmp_path / "m", RECIPE.model_copy(update={"target_modules": targets}))


def test_triplets_with_a_flipped_bit_are_refused(base, tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, toy_triplets(), TRIPLETS)
    content = path.read_bytes()
    for place in range(40, len(content) - 4000, 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(DamagedError, match=r"t\.parquet: (not a readable Parquet file|its columns)"):
            read_items({"toy": path}, True, tmp_path / "items")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedError, match="not a readable Parquet file"):
        read_validation(path, 500)
    write_table(path, toy_triplets().query("split == 'train'"), TRIPLETS)
    with pytest.raises(TrainingError, match="no validation triplet to choose by"):
        read_validation(path, 500)


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """A training with two checkpoints, as a kill leaves it, and the embeddings of an undisturbed one."""
    folder = tmp_path_factory.mktemp("stopped")
    write_table(folder / "t.parquet", toy_triplets(), TRIPLETS)
    settings = RECIPE.model_copy(update={"epochs": 2})
    training = Training(base, {"toy": str(folder / "t.parquet")}, settings, 3, str(folder / "m"), str(folder / "state"))
    train_model(training)
    write_manifest(folder / "m", {}, [], 0.0)
    (state,) = (folder / "state").iterdir()
    assert len(list(state.glob("checkpoint-*"))) == 2
    return training, state, embeddings(load_model(base, folder / "m"))


DAMAGE = ["trained.safetensors", "best.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", "whole.json"]


@pytest.mark.parametrize("how", ["cut", "gone", "both"])
def test_a_training_goes_on_from_the_last_checkpoint_that_is_whole(base, stopped, tmp_path, how, caplog):
    """Whatever is damaged, and whether one checkpoint is left or none: the end is the same."""
    training, state, expected = stopped
    names = DAMAGE if how == "cut" else DAMAGE[:2]
    for name in names:
        copy = tmp_path / name / "state"
        shutil.copytree(state, copy / state.name)
        (copy / "notes.txt").write_text("a stray file")
        (copy / state.name / "checkpoint-old").mkdir()
        checkpoints = sorted((copy / state.name).glob("checkpoint-[0-9]*"), key=lambda path: int(path.name[11:]))
        for checkpoint in checkpoints if how == "both" else checkpoints[1:]:
            if how == "gone":
                (checkpoint / name).unlink()
            else:
                (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:100])
        (items,) = (copy / state.name).rglob("*.arrow")
        items.write_bytes(b"")
        caplog.clear()
        folder = tmp_path / name / "m"
        with caplog.at_level("INFO"):
            train_model(replace(training, state=str(copy), folder=str(folder)))
        assert f"{checkpoints[1].name} is not whole" in caplog.text
        assert (f"going on from {checkpoints[0].name}" in caplog.text) == (how != "both")
        write_manifest(folder, {}, [], 0.0)
        np.testing.assert_allclose(embeddings(load_model(base, folder)), expected, atol=1e-6)


def test_a_full_disk_is_said(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        GroupTrainer, "_save_checkpoint", lambda *_: (_ for _ in ()).throw(RuntimeError("enforce fail"))
    )
    with pytest.raises(RuntimeError, match="enforce fail"):
        train(base, tmp_path / "m")
    monkeypatch.setattr("cachelora.train._LITTLE_SPACE", 2**80)
    with pytest.raises(TrainingError, match=r"the disk is full\. Make room and run again"):
        train(base, tmp_path / "m")


def test_an_adapter_for_other_layers_is_refused(base, trained, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(trained[2], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[: len(weights) // 2]), folder / "adapter_model.safetensors")
    write_manifest(folder, {}, [], 0.0)
    with pytest.raises(DamagedError, match="of its weights are missing, or for other layers"):
        load_model(base, folder)
    (folder / "adapter_config.json").write_text("[]")
    write_manifest(folder, {}, [], 0.0)
    with pytest.raises(DamagedError, match="does not fit"):
        load_model(base, folder)


def test_training_runs_without_the_base_models_dropout(base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(GroupTrainer, "train", lambda self, **_: seen.append(self.model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(base, tmp_path / "m")
    rates = {module.p for module in seen[0].modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.0}
    assert seen[0].transformers_model.config._attn_implementation == "eager"


def validated(model):
    """Stands for a validation that has no opinion."""
    return dict.fromkeys(("ap", "p_chr_auc", "margin", "positive_similarity"), 0.5)


def merge(base, adapters, settings, folder, validate=validated):
    started = time.monotonic()
    model, found = merge_adapters(base, adapters, settings, folder, validate, most_lost=0.05, seed=3)
    write_manifest(folder, {}, [], started)
    return model, found


# The mean of what agrees, so that the weights of TIES do not add up.
SHARES = {"svd": 0.5, "linear": 0.5, "cat": 0.5, "magnitude_prune": 0.5, "ties": 1.0, "dare_ties": 1.0}


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_at_weight_one_comes_back(base, trained, tmp_path, method):
    model, _ = merge(base, {"toy": trained[2]}, Merge(method=method, weight=1.0), tmp_path)
    expected = embeddings(load_model(base, trained[2]))
    np.testing.assert_allclose(embeddings(model), expected, atol=1e-6)
    np.testing.assert_allclose(embeddings(load_model(base, tmp_path)), expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_merged_with_itself_comes_back(base, trained, tmp_path, method):
    settings = Merge(method=method, weight=SHARES[method], density=1.0)
    model, _ = merge(base, {"a": trained[2], "b": trained[2]}, settings, tmp_path)
    np.testing.assert_allclose(embeddings(model), embeddings(load_model(base, trained[2])), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_has_its_rank_and_size_and_loads_with_plain_peft(base, trained, other_adapter, tmp_path, method):
    model, _ = merge(base, {"a": trained[2], "b": other_adapter}, Merge(method=method), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    rank = 8 if method == "cat" else 4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == rank
    assert all(value.isfinite().all() and rank in value.shape for value in weights.values())
    # In six layers, four times between 384 and 384 dimensions, twice between 384 and 1536.
    numbers = 6 * rank * (4 * (384 + 384) + 2 * (384 + 1536))
    assert sum(value.numel() for value in weights.values()) == numbers
    assert 4 * numbers < (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 20_000
    plain = SentenceTransformer(str(base_folder(base)), device="cpu")
    tuner = PeftModel.from_pretrained(plain.transformers_model, str(tmp_path))
    expected = embeddings(model)
    np.testing.assert_allclose(embeddings(plain), expected, atol=1e-6)
    merged = tuner.merge_and_unload()
    fresh = SentenceTransformer(str(base_folder(base)), device="cpu")
    fresh.transformers_model.load_state_dict(merged.state_dict())
    np.testing.assert_allclose(embeddings(fresh), expected, atol=1e-5)


def test_an_svd_merge_is_the_best_low_rank_sum(base, trained, other_adapter, tmp_path):
    merge(base, {"a": trained[2], "b": other_adapter}, Merge(method="svd", weights={"a": 0.7}), tmp_path)
    first, second, merged = (
        {name: value.float() for name, value in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (trained[2], other_adapter, tmp_path)
    )
    names = [name.removesuffix("lora_A.weight") for name in first if name.endswith("lora_A.weight")]
    assert len(names) == 36  # six linear layers in each of six blocks
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in names:

        def update(weights, scale, name=name):
            return scale * weights[f"{name}lora_B.weight"] @ weights[f"{name}lora_A.weight"]

        u, s, vh = torch.linalg.svd(0.7 * update(first, 2) + 0.5 * update(second, 2))
        best = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
        # The merged adapter's own scale is alpha / r of its saved config.
        torch.testing.assert_close(update(merged, config["lora_alpha"] / config["r"]), best, atol=1e-5, rtol=1e-3)


def test_side_by_side_is_the_whole_sum(base, trained, other_adapter, tmp_path):
    adapters = {"a": trained[2], "b": other_adapter}
    whole, _ = merge(base, adapters, Merge(method="cat"), tmp_path / "cat")
    sum_of_both, _ = merge(base, adapters, Merge(method="svd", rank=8), tmp_path / "svd8")
    np.testing.assert_allclose(embeddings(whole), embeddings(sum_of_both), atol=1e-6)
    cut, _ = merge(base, adapters, Merge(method="cat", rank=4), tmp_path / "cat4")
    of_its_rank, _ = merge(base, adapters, Merge(method="svd"), tmp_path / "svd4")
    np.testing.assert_allclose(embeddings(cut), embeddings(of_its_rank), atol=1e-6)
    assert np.abs(embeddings(cut) - embeddings(whole)).max() > 1e-4


def test_the_weights_are_those_that_validate_best(base, trained, other_adapter, tmp_path):
    """A judge who wants the embeddings of 0.6 times the one and 0.2 times the other is given them."""
    adapters = {"a": trained[2], "b": other_adapter}
    wanted, _ = merge(base, adapters, Merge(method="cat", weights={"a": 0.6, "b": 0.2}), tmp_path / "wanted")
    goal = embeddings(wanted)

    def validate(model):
        near = 1 - float(np.abs(embeddings(model) - goal).max())
        return {"ap": near, "p_chr_auc": near, "margin": near, "positive_similarity": 0.5}

    settings = Merge(method="cat", weight=[0.2, 0.4, 1.0], factors=[0.5, 1.5])
    model, found = merge(base, adapters, settings, tmp_path / "found", validate)
    assert found["weights"] == pytest.approx({"a": 0.6, "b": 0.2})
    assert found["validation"] == max((entry["validation"] for entry in found["tried"]), key=lambda m: m["ap"])
    assert len(found["tried"]) == 3 + 2 + 2
    np.testing.assert_allclose(embeddings(model), goal, atol=1e-6)
    np.testing.assert_allclose(embeddings(load_model(base, tmp_path / "found")), goal, atol=1e-6)


def test_what_is_dropped_at_random_is_the_same_each_time(base, trained, other_adapter, tmp_path):
    adapters, settings = {"a": trained[2], "b": other_adapter}, Merge(method="dare_ties", density=[0.3, 0.6])
    first, found = merge(base, adapters, settings, tmp_path / "1")
    second, _ = merge(base, adapters, settings, tmp_path / "2")
    assert {entry["density"] for entry in found["tried"]} == {0.3, 0.6}
    np.testing.assert_array_equal(embeddings(first), embeddings(second))


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        ({"rank": 2}, "linear", "different ranks: 2, 4"),
        ({"target_modules": ["query", "key"]}, "svd", "different target modules: dense key query value, key query"),
    ],
)
def test_adapters_that_do_not_fit_are_not_merged(base, trained, tmp_path, change, method, message):
    train(base, tmp_path / "other", RECIPE.model_copy(update={**change, "epochs": 1}))
    with pytest.raises(ModelError, match=f"the adapters have {message}"):
        merge(base, {"a": trained[2], "b": tmp_path / "other"}, Merge(method=method), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_adapters_of_another_base_model_are_not_merged(base, trained, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(trained[2], tmp_path / name)
        if name == "b":
            file = tmp_path / name / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "another"}))
        write_manifest(tmp_path / name, {}, [], 0.0)
    with pytest.raises(ModelError, match="the adapters have different base models: another, "):
        merge(base, {"a": tmp_path / "a", "b": tmp_path / "b"}, Merge(method="svd"), tmp_path / "m")


def test_adapters_of_other_weights_than_the_base_models_are_not_merged(base, trained, tmp_path):
    shutil.copytree(trained[2], tmp_path / "a")
    write_manifest(tmp_path / "a", {"base_sha256": "0" * 64}, [], 0.0)
    with pytest.raises(DamagedError, match="it was trained on other weights"):
        merge(base, {"a": tmp_path / "a"}, Merge(method="svd"), tmp_path / "m")


def test_an_adapter_that_lacks_weights_is_not_merged(base, trained, other_adapter, tmp_path):
    shutil.copytree(trained[2], tmp_path / "b")
    file = tmp_path / "b" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if ".layer.0." not in name}, file)
    write_manifest(tmp_path / "b", {}, [], 0.0)
    with pytest.raises(DamagedError, match="b: 12 of its weights are missing"):
        merge(base, {"a": other_adapter, "b": tmp_path / "b"}, Merge(method="svd"), tmp_path / "m")


@pytest.mark.parametrize(("method", "weight"), [("cat", 1e6), ("svd", 1e6), ("linear", 1e6)])
def test_a_merge_that_is_no_number_is_not_saved(base, trained, tmp_path, method, weight):
    shutil.copytree(trained[2], tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: value.float() * 1e30 for name, value in load_file(file).items()}, file)
    write_manifest(tmp_path / "a", {}, [], 0.0)
    settings = Merge(method=method, weight=weight)

    def measured(model):
        return validated(model) | {"margin": float(embeddings(model).sum())}

    with pytest.raises(ModelError, match=r"the embeddings are not numbers\. Lower"):
        merge(base, {"a": tmp_path / "a"}, settings, tmp_path / "m", measured)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_no_merge_has_a_higher_rank_than_its_smallest_layer(base, trained, other_adapter, tmp_path, method):
    model, _ = merge(base, {"a": trained[2], "b": other_adapter}, Merge(method=method, rank=500), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["r"] == 384
    np.testing.assert_allclose(embeddings(load_model(base, tmp_path / "m")), embeddings(model), atol=1e-6)


def test_a_merge_takes_the_place_of_a_model_of_another_kind(base, trained, tmp_path):
    (tmp_path / "detector.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    merge(base, {"a": trained[2]}, Merge(method="svd"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    ]  # fmt: skip


def test_equal_weights_are_tried_once(base, trained, tmp_path):
    settings = Merge(method="svd", weights={"a": 1.0}, weight=[0.1, 0.2])
    _, found = merge(base, {"a": trained[2]}, settings, tmp_path)
    assert [entry["weights"] for entry in found["tried"]] == [{"a": 1.0}]


def test_a_damaged_adapter_is_not_merged(base, trained, tmp_path):
    shutil.copytree(trained[2], tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"\n", b"", 5)[:-5])
    with pytest.raises(DamagedError, match="its header"):
        merge(base, {"a": tmp_path / "a"}, Merge(method="svd"), tmp_path / "m")


def test_the_deployed_folder_is_the_adapter_without_peft(base, trained, tmp_path):
    folder = tmp_path / "deployed"
    deploy_model(base, trained[2], "toy", PROBES, 8, folder)
    expected = embeddings(load_model(base, trained[2]))
    np.testing.assert_allclose(embeddings(SentenceTransformer(str(folder))), expected, atol=1e-5)
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == load_file(base_folder(base) / "model.safetensors").keys() - {"embeddings.position_ids"}
    # The snippet of the model card, in a process of its own that cannot import peft.
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert len(snippet.strip().splitlines()) <= 10
    code = "import sys; sys.modules['peft'] = None\n" + snippet.replace("path/to/this/folder", str(folder))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"paraphrase 0\.\d+ look-alike 0\.\d+\n", result.stdout)
