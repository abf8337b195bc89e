"""Detectors by what they tell apart and how honest they are; hybrids by whose similarities come out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachelora.config import Hybrid
from cachelora.errors import DamagedError, InputError
from cachelora.hybrid import (
    DETECTORS,
    calibration_error,
    detector_metrics,
    fit_detector,
    read_detector,
    routes,
    score_hybrid,
)
from cachelora.manifest import write_manifest
from cachelora.models import encode_texts, load_model, score_pairs

QUERIES = {
    "medical": ["symptoms of gout", "dose of ibuprofen for a child", "what causes asthma", "is measles contagious",
                "treatment of pneumonia", "side effects of metformin", "high blood pressure diet", "migraine at night"],
    "programming": ["reverse a list in python", "git undo last commit", "what is a null pointer", "sql join two tables",
                    "docker container exits at once", "regex for an email", "sort a dict by value", "borrow checker"],
    "law": ["notice period for tenants", "can I sue my landlord", "copyright of a song", "how to contest a will",
            "penalty for drunk driving", "who gets custody of a child", "is a verbal contract valid", "GDPR request"],
}  # fmt: skip


@pytest.fixture(scope="module")
def vectors(base):
    model = load_model(base, None)
    return {domain: np.array([*encode_texts(model, texts, 8).values()]) for domain, texts in QUERIES.items()}


def halves(vectors, names=None):
    chosen = {name: vectors[name] for name in names or vectors}
    return {name: found[::2] for name, found in chosen.items()}, {name: found[1::2] for name, found in chosen.items()}


@pytest.mark.parametrize("method", DETECTORS)
@pytest.mark.parametrize("names", [["medical", "law"], ["programming", "medical", "law"]])
def test_domains_are_told_apart_on_queries_not_seen(vectors, method, names):
    train, validation = halves(vectors, names)
    detector = fit_detector(train, validation, method)
    assert detector.domains == tuple(names)
    right = 0
    for number, found in enumerate(validation.values()):
        said = detector.probabilities(found)
        np.testing.assert_allclose(said.sum(axis=1), 1)
        right += (said.argmax(axis=1) == number).sum()
    assert right >= len(names) * 3


def test_two_domains_are_told_apart_as_scikit_learn_does(vectors):
    from sklearn.linear_model import LogisticRegression

    pair = {name: vectors[name] for name in ("medical", "law")}
    weights, bias = DETECTORS["logistic"](np.concatenate([*pair.values()]), np.repeat([0, 1], 8), 2)
    model = LogisticRegression(C=3.0, class_weight="balanced", max_iter=2000)
    model.fit(np.concatenate([*pair.values()]), np.repeat([0, 1], 8))
    logits = vectors["programming"] @ weights.T + bias
    expected = model.predict_proba(vectors["programming"])
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), expected, atol=1e-6)


@pytest.mark.parametrize("sharpness", [0.2, 5.0])
def test_the_probabilities_are_as_sure_as_they_are_right(sharpness):
    """Labels drawn with known probabilities: whatever the scale of the vectors, the detector finds the odds."""
    random = np.random.default_rng(1)
    true = random.random(4000) < 0.8
    # Of the first kind of vector 80 % are of domain a, of the other 20 %.
    both = np.array([[1.0, 0.0], [0.0, 1.0]]) * sharpness
    a = both[np.where(true, 0, 1)]
    b = both[np.where(random.random(4000) < 0.8, 1, 0)]
    detector = fit_detector({"a": a[:2000], "b": b[:2000]}, {"a": a[2000:], "b": b[2000:]}, "centroid")
    said = detector.probabilities(both)
    assert said[0, 0] == pytest.approx(0.8, abs=0.03)
    assert said[1, 1] == pytest.approx(0.8, abs=0.03)
    everything = detector.probabilities(np.concatenate([a, b]))
    assert calibration_error(everything, np.repeat([0, 1], 4000)) < 0.03


@pytest.mark.parametrize("method", DETECTORS)
def test_a_few_queries_that_are_all_told_apart_make_nothing_certain(vectors, method):
    train, validation = halves(vectors, ["medical", "law"])
    detector = fit_detector(train, validation, method)
    assert (detector.probabilities(validation["law"]).argmax(axis=1) == 1).all()
    # Four queries of four count as five in six.
    assert 0.6 < detector.probabilities(np.concatenate([*validation.values()])).max(axis=1).mean() < 0.85
    assert detector.probabilities(vectors["programming"]).max(axis=1).mean() < 0.85


def test_the_calibration_error_by_hand():
    # Two queries at .9, one of them right; two at .6, both right.
    said = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(said, np.array([0, 1, 0, 0])) == pytest.approx((abs(1 - 1.8) + abs(2 - 1.2)) / 4)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1), st.floats(0, 1))
@settings(deadline=None)
def test_what_is_not_assigned_is_not_assigned_wrongly(rows, reject):
    said = np.array(rows) / np.array(rows).sum(axis=1, keepdims=True)
    found = detector_metrics(said, 1, reject)
    assert found["n"] == len(rows)
    assert 0 <= found["assigned_wrong"] <= min(found["assigned"], 1 - found["accuracy"]) + 1e-12
    assert detector_metrics(said, 1, 0.0)["assigned"] == 1


def test_a_detector_is_written_and_read(vectors, base, tmp_path):
    detector = fit_detector(*halves(vectors), "logistic")
    detector.save(tmp_path)
    with pytest.raises(DamagedError, match="not finished"):
        read_detector(base, tmp_path)
    write_manifest(tmp_path, {}, [], 0.0)
    again = read_detector(base, tmp_path)
    write_manifest(tmp_path, {"base_sha256": "0" * 64}, [], 0.0)
    with pytest.raises(DamagedError, match="other weights"):
        read_detector(base, tmp_path)
    write_manifest(tmp_path, {}, [], 0.0)
    assert again.domains == detector.domains
    np.testing.assert_array_equal(again.probabilities(vectors["law"]), detector.probabilities(vectors["law"]))
    weights = tmp_path / "detector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(DamagedError, match="SHA-256"):
        read_detector(base, tmp_path)


@pytest.mark.parametrize("missing", ["train", "validation", "others"])
def test_what_cannot_be_told_apart_is_refused(vectors, missing):
    train, validation = halves(vectors)
    if missing == "others":
        train, validation = {"law": train["law"]}, {"law": validation["law"]}
    else:
        (train if missing == "train" else validation)["law"] = np.zeros((0, 384))
    with pytest.raises(InputError, match=r"^law: "):
        fit_detector(train, validation, "logistic")


def test_the_unsure_and_those_without_a_model_go_to_the_common_one(vectors):
    detector = fit_detector(*halves(vectors), "logistic")
    said = np.array([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25], [0.05, 0.9, 0.05], [0.1, 0.1, 0.8]])
    chosen = routes(said, detector, Hybrid(reject=0.5, otherwise="base"), {"medical": "m", "law": "l"})
    assert chosen == ["m", "base", "base", "l"]


def test_similarities_are_those_of_the_model_of_the_anchor(vectors, base, tmp_path):
    import pandas as pd
    import torch
    from peft import LoraConfig, get_peft_model_state_dict

    from cachelora.models import save_adapter

    model = load_model(base, None)
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    with torch.no_grad():
        for name, value in model.transformers_model.named_parameters():
            if "lora_" in name:
                value.mul_(30)
    network = model.transformers_model
    weights = get_peft_model_state_dict(network, save_embedding_layers=False)
    save_adapter(weights, network.peft_config["default"], "base", tmp_path)
    write_manifest(tmp_path, {}, [], 0.0)
    pairs = pd.DataFrame(
        [
            ("dose of ibuprofen for a child", "how much ibuprofen may a kid take"),
            ("git undo last commit", "take back HEAD"),
            ("treatment of pneumonia", "symptoms of pneumonia"),
        ],
        columns=["query", "other"],
        index=[7, 3, 5],
    )
    detector = fit_detector(*halves(vectors), "logistic")
    settings = Hybrid(reject=0.0, otherwise="base")
    adapters = {"m": tmp_path, "base": None}
    scored = score_hybrid(base, detector, settings, {"medical": "m"}, adapters, pairs, 8)
    assert list(scored.index) == [7, 3, 5]
    assert list(scored["route"]) == ["m", "base", "m"]
    of_base = score_pairs(load_model(base, None), pairs, 8)["similarity"].to_numpy()
    of_adapter = score_pairs(load_model(base, tmp_path), pairs, 8)["similarity"].to_numpy()
    assert np.abs(of_base - of_adapter).max() > 0.01
    np.testing.assert_allclose(scored["similarity"], [of_adapter[0], of_base[1], of_adapter[2]], atol=1e-6)
