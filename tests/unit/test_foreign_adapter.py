"""Adapters that were trained elsewhere: what fits is measured as peft itself would, what does not is refused."""

import json
import logging
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from cachelora.cli import main
from cachelora.errors import DamagedError
from cachelora.manifest import write_manifest
from cachelora.models import base_folder, encode_texts, load_model

TEXTS = ["how to enable 2FA", "turn on two-factor authentication", "how to disable 2FA"]


def save(model, folder):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    return save(AutoModel.from_pretrained(base_folder(base)), tmp_path_factory.mktemp("elsewhere") / "adapter")


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def test_a_folder_of_plain_peft_embeds_as_peft_does_and_nothing_vouches_for_it(base, adapter, caplog):
    with caplog.at_level(logging.WARNING):
        found = encode_texts(load_model(base, adapter, foreign=True), TEXTS, 8)
    assert "no manifest vouches for it; it says that it was trained on" in caplog.text
    folder = base_folder(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), adapter).eval()
    plain = encode_texts(load_model(base, None), TEXTS, 8)
    for text in TEXTS:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(found[text], torch.nn.functional.normalize(states, dim=0), atol=1e-5)
        assert np.abs(found[text] - plain[text]).max() > 1e-3


def test_an_adapter_of_ours_needs_its_manifest(base, adapter):
    with pytest.raises(DamagedError, match=r"manifest\.json: no such file"):
        load_model(base, adapter)


def test_a_manifest_is_believed_where_there_is_one(base, adapter, caplog):
    write_manifest(adapter, {"base_sha256": "0" * 64}, [], time.monotonic())
    with pytest.raises(DamagedError, match="it was trained on other weights"):
        load_model(base, adapter, foreign=True)
    write_manifest(adapter, {}, [], time.monotonic())
    load_model(base, adapter, foreign=True)
    assert "vouches" not in caplog.text


@pytest.mark.parametrize(("layers", "hidden"), [(12, 384), (6, 48), (3, 384)])
def test_an_adapter_for_another_model_is_refused(base, tmp_path, layers, hidden):
    config = BertConfig(
        vocab_size=100, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=16
    )
    folder = save(BertModel(config), tmp_path / "other")
    with pytest.raises(DamagedError, match=r"it does not fit|are missing, or for other layers"):
        load_model(base, folder, foreign=True)


def cut(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


def change_config(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "its header promises"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"it has no adapter_config\.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is not that of a LoRA adapter"),
        (change_config(peft_type="PROMPT_TUNING"), "is not that of a LoRA adapter"),
        (change_config(target_modules=["q_proj", "v_proj"]), "it does not fit"),
        (change_config(r=8), "it does not fit"),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            r"it has no adapter_model\.safetensors",
        ),
    ],
)
def test_a_damaged_adapter_is_refused(base, adapter, damage, message):
    damage(adapter)
    with pytest.raises(DamagedError, match=message):
        load_model(base, adapter, foreign=True)


def test_the_command_shows_base_model_and_adapter_side_by_side(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    topics = ("wifi", "sync", "roaming", "captions", "cookies", "haptics", "backup", "vpn", "narrator", "themes")
    rows = [
        {"anchor": f"activate {topic}", "positive": f"how to enable {topic}", "negative": f"how to disable {topic}"}
        for topic in topics
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "--adapter", str(adapter), str(path)]) == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert ["metric", "base", "adapter", "change"] in lines
    margin = next(line for line in lines if line[:1] == ["margin"])
    # A value, low and high for each of the two models, and for the change.
    assert len(margin) == 10
    base, changed, difference = float(margin[1]), float(margin[4]), float(margin[7])
    assert difference == pytest.approx(changed - base, abs=2e-3)
    assert "In brackets: 95% intervals" in said.out
