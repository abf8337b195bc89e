"""Training by its effect on held-out data; merging and deploying by the embeddings that come out."""

import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from cachelora.config import Merge, Train
from cachelora.deploy import deploy_model
from cachelora.errors import DamagedError, ModelError, TrainingError
from cachelora.manifest import write_manifest
from cachelora.merge import merge_adapters
from cachelora.models import base_folder, encode_texts, load_model
from cachelora.schemas import TRIPLETS
from cachelora.train import (
    GroupBatchSampler,
    NegativesCollator,
    SortedRankingLoss,
    explode_negatives,
    pool_domains,
    train_adapter,
)

PROBES = ["symptoms of gout", "how do I turn off 2FA?", "notice period for a lodger", "difference between CBT and ACT"]
# What the base model gets wrong and a few steps can teach: the negative repeats the words, the positive does not.
TOPICS = ["wifi", "bluetooth", "location", "roaming", "dark mode", "captions", "backup", "autofill", "sync", "cookies",
          "tracking", "haptics", "vibration", "mirroring", "airplane mode", "narrator"]  # fmt: skip


def toy_triplets(seed=0):
    rows = []
    for number, topic in enumerate(TOPICS):
        negatives = [{"kind": "polarity", "text": f"how to disable {topic}"}]
        split = "validation" if number % 4 == seed % 4 else "train"
        rows.append((f"activate {topic} for me", f"how to enable {topic}", negatives, topic, split))
    return pd.DataFrame(rows, columns=TRIPLETS.names)


RECIPE = Train(rank=4, alpha=8, epochs=4, batch_size=6, negatives_per_row=1, precision="float32")


def train(base, folder, recipe=RECIPE, triplets=None):
    started = time.monotonic()
    model = load_model(base, None)
    metrics = train_adapter(model, triplets or {"toy": toy_triplets()}, recipe, 3, base.name, folder)
    write_manifest(folder, {}, [], started)
    return model, metrics


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, metrics = train(base, folder)
    return model, metrics, folder


@pytest.fixture(scope="module")
def other_adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    train(base, folder, RECIPE.model_copy(update={"epochs": 1}), {"toy": toy_triplets(1)})
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
    assert all(np.isfinite(row["loss"]) for row in metrics["loss"])


def test_the_saved_adapter_is_the_trained_one_also_for_plain_peft(base, trained):
    model, _, folder = trained
    expected = embeddings(model)
    np.testing.assert_allclose(embeddings(load_model(base, folder)), expected, atol=1e-6)
    plain = SentenceTransformer(str(base_folder(base)))
    plain[0].auto_model = PeftModel.from_pretrained(plain[0].auto_model, str(folder))
    np.testing.assert_allclose(embeddings(plain), expected, atol=1e-6)
    assert not np.allclose(embeddings(load_model(base, None)), expected, atol=1e-2)


def test_the_adapter_names_its_base_and_no_path_of_this_machine(trained, base):
    text = (trained[2] / "adapter_config.json").read_text()
    assert f'"base_model_name_or_path": "{base.name}"' in text
    assert "site-packages" not in text
    assert str(trained[2]) not in text


def test_the_best_checkpoint_is_kept_not_the_last(base, tmp_path):
    # So high a rate that later steps undo what earlier ones did.
    recipe = RECIPE.model_copy(update={"learning_rate": 0.05, "epochs": 6, "schedule": "constant"})
    model, metrics = train(base, tmp_path, recipe)
    from cachelora.train import Validation

    table = toy_triplets()
    found = Validation({"toy": table[table["split"] == "validation"]})(model)
    best = max(metrics["validation"][1:], key=lambda row: (row["ap"], row["margin"]))
    assert metrics["best_step"] == best["step"]
    assert found["ap"] == pytest.approx(best["ap"])
    assert found["margin"] == pytest.approx(best["margin"], abs=1e-6)


def test_training_is_seeded(base, trained, tmp_path):
    train(base, tmp_path)
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, trained[2]))
    assert again.keys() == first.keys()
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-6)


def test_layers_that_do_not_exist_are_refused(base, tmp_path):
    with pytest.raises(TrainingError, match=r"train\.target_modules: \['q_proj'\] do not fit"):
        train(base, tmp_path, RECIPE.model_copy(update={"target_modules": ["q_proj"]}))


def test_a_loss_that_is_no_number_stops_the_training(base, tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+\. Lower train\.learning_rate"):
        train(base, tmp_path, RECIPE.model_copy(update={"learning_rate": 1e30, "warmup_share": 0.0}))
    assert not (tmp_path / "adapter_model.safetensors").exists()


groups_lists = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60)


@given(groups_lists, st.integers(2, 9), st.integers(0, 3), st.integers(0, 3))
def test_batches_hold_no_group_twice_and_lose_at_most_lone_rows(groups, batch_size, seed, epoch):
    sampler = GroupBatchSampler(groups, batch_size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    for batch in batches:
        assert 2 <= len(batch) <= batch_size
        assert len({groups[row] for row in batch}) == len(batch)
    assert len(rows) == len(set(rows))
    assert len(batches) <= len(sampler)
    # What is left out has no other group left to be told from.
    left_out = Counter(groups) - Counter(groups[row] for row in rows)
    assert len(left_out) <= 1
    if max(Counter(groups).values()) <= len(groups) / batch_size:
        assert left_out.total() <= 1


def test_a_small_domain_is_spread_over_the_epoch():
    # 60 groups of 3 rows, and 15 groups whose 3 rows come four times.
    groups = [f"large {i // 3}" for i in range(180)] + [f"small {i // 12}" for i in range(180)]
    batches = list(GroupBatchSampler(groups, 16, 1))
    assert len(batches) == 23
    shares = [sum(groups[row].startswith("small") for row in batch) / len(batch) for batch in batches[:-3]]
    assert all(0.1 < share < 0.9 for share in shares)


def test_epochs_differ_and_repeat_by_seed():
    groups = [str(i // 3) for i in range(60)]
    orders = []
    for epoch in (0, 1, 0):
        sampler = GroupBatchSampler(groups, 8, 1)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 5))
@settings(deadline=None)
def test_pooled_domains_give_all_rows_and_small_ones_repeat(sizes, seed):
    tables = {
        str(number): pd.DataFrame(
            {"anchor": [f"{number} {i}" for i in range(size)], "group": [str(i) for i in range(size)]}
        )
        for number, size in enumerate(sizes)
    }
    pool = pool_domains(tables, seed)
    for name, table in tables.items():
        counts = Counter(anchor for anchor in pool["anchor"] if anchor.startswith(f"{name} "))
        assert counts.total() == min(max(sizes), 4 * len(table))
        assert len(counts) == len(table)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert pool["group"].nunique() == pool["anchor"].nunique()


def texts_by_role(batch):
    """Put the texts of a batch back in order: a row for each, anchor and positive first."""
    texts = [text for k in range(batch["label"].shape[1]) for text in batch[f"text_{k}_text"]]
    return [[texts[number] for number in row] for row in batch["label"]]


def test_negatives_are_drawn_anew_each_epoch_without_repetition():
    seen = []
    collator = NegativesCollator(lambda texts, **_: {"text": texts}, 1, 2)
    feature = {"anchor": "a", "positive": "p", "negatives": [{"text": str(i)} for i in range(4)], "row": 5}
    for epoch in range(12):
        collator._epoch = epoch
        ((anchor, positive, *drawn),) = texts_by_role(collator([feature]))
        assert (anchor, positive) == ("a", "p")
        assert drawn[0] != drawn[1]
        assert texts_by_role(collator([feature]))[0][2:] == drawn
        seen += drawn
    assert set(seen) == set("0123")
    collator = NegativesCollator(lambda texts, **_: {"text": texts}, 1, 3)
    assert texts_by_role(collator([feature | {"negatives": [{"text": "only"}]}])) == [["a", "p", *["only"] * 3]]


def test_training_runs_without_the_base_models_dropout(trained):
    model, *_ = trained
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.0}
    assert model.transformers_model.config._attn_implementation == "eager"


def test_sorting_by_length_changes_the_columns_but_not_the_loss(base):
    model = load_model(base, None).eval()
    rows = [
        {"anchor": f"{'long ' * n}anchor {n}", "positive": f"positive {n} {'x' * n * n}", "row": n}
        | {"negatives": [{"text": f"negative {n} number {k} {'word ' * k * 5}"} for k in range(3)]}
        for n in range(6)
    ]
    batch = NegativesCollator(model.preprocess, 1, 2)(rows)
    as_text = NegativesCollator(lambda texts, **_: {"text": texts}, 1, 2)(rows)
    lengths = [len(text) for k in range(4) for text in as_text[f"text_{k}_text"]]
    assert lengths == sorted(lengths)
    in_order = texts_by_role(as_text)
    assert [row[:2] for row in in_order] == [[row["anchor"], row["positive"]] for row in rows]
    keys = ("input_ids", "attention_mask", "token_type_ids")
    columns = [{key: batch[f"text_{k}_{key}"] for key in keys} for k in range(4)]
    plain = [model.preprocess(list(column)) for column in zip(*in_order, strict=True)]
    with torch.no_grad():
        loss = SortedRankingLoss(model, scale=20)(columns, batch["label"])
        expected = MultipleNegativesRankingLoss(model, scale=20)(plain, None)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_exploding_keeps_every_negative():
    exploded = explode_negatives(toy_triplets())
    assert len(exploded) == len(TOPICS)
    assert set(exploded.columns) == {"anchor", "positive", "negative", "kind", "group"}


@pytest.mark.parametrize("method", ["svd", "linear"])
def test_one_adapter_at_weight_one_comes_back(base, trained, tmp_path, method):
    model = load_model(base, None)
    merge_adapters(model, {"toy": trained[2]}, Merge(method=method, weight=1.0), tmp_path)
    write_manifest(tmp_path, {}, [], 0.0)
    expected = embeddings(load_model(base, trained[2]))
    np.testing.assert_allclose(embeddings(model), expected, atol=1e-6)
    np.testing.assert_allclose(embeddings(load_model(base, tmp_path)), expected, atol=1e-6)


def test_an_svd_merge_is_the_best_low_rank_sum(base, trained, other_adapter, tmp_path):
    model = load_model(base, None)
    merge_adapters(model, {"a": trained[2], "b": other_adapter}, Merge(method="svd", weight=0.5), tmp_path)
    first, second, merged = (
        load_file(folder / "adapter_model.safetensors") for folder in (trained[2], other_adapter, tmp_path)
    )
    names = [name.removesuffix("lora_A.weight") for name in first if name.endswith("lora_A.weight")]
    assert len(names) == 37  # six linear layers in each of six blocks, and the pooler
    for name in names:

        def update(weights, scale, name=name):
            return scale * weights[f"{name}lora_B.weight"] @ weights[f"{name}lora_A.weight"]

        wanted = 0.5 * (update(first, 2) + update(second, 2))
        u, s, vh = torch.linalg.svd(wanted)
        best = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
        # The merged adapter's own scale is alpha / r of its saved config.
        import json

        config = json.loads((tmp_path / "adapter_config.json").read_text())
        torch.testing.assert_close(update(merged, config["lora_alpha"] / config["r"]), best, atol=1e-5, rtol=1e-3)


def test_adapters_that_do_not_fit_are_not_merged(base, trained, tmp_path):
    train(base, tmp_path / "rank2", RECIPE.model_copy(update={"rank": 2, "epochs": 1}))
    with pytest.raises(ModelError, match="the adapters have different ranks: 2, 4"):
        merge_adapters(
            load_model(base, None),
            {"a": trained[2], "b": tmp_path / "rank2"},
            Merge(method="svd", weight=1),
            tmp_path / "m",
        )
    assert not (tmp_path / "m").exists()


def test_a_damaged_adapter_is_not_merged(base, trained, tmp_path):
    import shutil

    shutil.copytree(trained[2], tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"\n", b"", 5)[:-5])
    with pytest.raises(DamagedError, match="its header"):
        merge_adapters(load_model(base, None), {"a": tmp_path / "a"}, Merge(method="svd", weight=1), tmp_path / "m")


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
