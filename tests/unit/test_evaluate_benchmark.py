import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from cachelora.benchmark import benchmark_markdown, benchmark_table, read_published
from cachelora.config import Evaluate
from cachelora.errors import ConfigError
from cachelora.evaluate import join_testsets, measure
from cachelora.models import load_model, score_triplets
from cachelora.schemas import SCORES

SETTINGS = Evaluate(bootstrap=500)


def scores(positive, negative, test_set="law"):
    n = len(positive)
    kinds = ["aspect", "topic"] * n
    ids = [str(number) for number in range(n)]
    rows = zip([test_set] * n, ["v1"] * n, ids, kinds[:n], ids, positive, negative, strict=True)
    return pd.DataFrame(list(rows), columns=SCORES.names)


def found(results, metric, kind="all"):
    return next(row for row in results if row["metric"] == metric and row["kind"] == kind)


def test_similarities_are_those_of_plain_transformers_and_numpy(base):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from cachelora.models import base_folder

    folder = base_folder(base)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def embed(text):
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            return torch.nn.functional.normalize(model(**tokens).last_hidden_state[0].mean(dim=0), dim=0).numpy()

    texts = ("symptoms of gout", "what are the signs of podagra?", "treatment of gout, please, my toe hurts a lot")
    table = pd.DataFrame(
        [["1", *texts, "aspect", "g", "v1"]],
        columns=["test_id", "anchor", "positive", "negative", "kind", "group", "test_version"],
    )
    scored = score_triplets(load_model(base, None), join_testsets({"x": table}), 2)[SCORES.names]
    row = scored.iloc[0]
    anchor, positive, negative = map(embed, texts)
    assert row["positive_similarity"] == pytest.approx(anchor @ positive, abs=1e-5)
    assert row["negative_similarity"] == pytest.approx(anchor @ negative, abs=1e-5)


def test_changes_are_paired():
    random = np.random.default_rng(1)
    positive, negative = random.normal(0.6, 0.3, 100), random.normal(0.5, 0.3, 100)
    base = scores(positive, negative)
    better = scores(positive + 0.01, negative)
    row = found(measure(better, base, SETTINGS, 1), "margin")
    # The margins themselves vary a lot, their difference not at all.
    assert row["high"] - row["low"] > 0.1
    assert row["change"] == pytest.approx(0.01)
    assert (row["change_low"], row["change_high"]) == (pytest.approx(0.01), pytest.approx(0.01))


def test_relative_change_only_where_the_base_margin_is_surely_positive():
    good, bad = scores([0.9] * 9 + [0.8], [0.4] * 10), scores([0.4] * 10, [0.5] * 10)
    row = found(measure(scores([0.99] * 10, [0.4] * 10), good, SETTINGS, 1), "margin")
    assert row["relative_change"] == pytest.approx(0.59 / 0.49 - 1)
    assert row["relative_change_low"] <= row["relative_change"] <= row["relative_change_high"]
    assert found(measure(good, bad, SETTINGS, 1), "margin")["relative_change"] is None


def test_kinds_are_measured_apart_and_add_up():
    results = measure(*[scores([0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4])] * 2, SETTINGS, 1)
    assert all(row["low"] is None and row["change_high"] is None for row in results)
    assert found(results, "margin", "aspect")["value"] == pytest.approx(0.6)
    assert found(results, "margin", "topic")["value"] == pytest.approx(0.4)
    assert found(results, "margin")["value"] == pytest.approx(0.5)
    assert found(results, "margin", "look-alike")["value"] == pytest.approx(0.6)
    assert {row["kind"] for row in results} == {"all", "look-alike", "aspect", "topic"}
    assert all(row["change"] == 0 for row in results)


def test_scores_of_other_triplets_are_refused():
    with pytest.raises(ValueError, match="not about the same triplets"):
        measure(scores([0.1], [0.2]), scores([0.1], [0.2], "medical"), SETTINGS, 1)


@pytest.fixture
def table():
    random = np.random.default_rng(2)
    base = scores(random.normal(0.6, 0.1, 40), random.normal(0.5, 0.1, 40))
    model = base.assign(positive_similarity=base["positive_similarity"] + 0.1)
    return benchmark_table(
        [
            {"base_model": "b", "model": "base", "results": measure(base, base, SETTINGS, 1)},
            {"base_model": "b", "model": "law", "results": measure(model, base, SETTINGS, 1)},
        ],
        read_published(ROOT / "config/published.yaml"),
    )


def test_markdown_shows_models_changes_and_published_numbers_marked_as_such(table):
    published = read_published(ROOT / "config/published.yaml")
    text = benchmark_markdown(table, published, 0.95, 0.05, {})
    assert "Over seeds" not in text
    assert "## law (40 triplets, v1), base model b" in text
    overview, *_ = (line for line in text.splitlines() if line.startswith("| law "))
    assert overview == "| law     | +0.100 [+0.100, +0.100]* |"
    lookalikes, easy = (text.split(f"## {title}")[1].split("## ")[0] for title in ("Accuracy on", "Margin on easy"))
    assert "| law     | +" in lookalikes
    assert overview in easy
    detail = next(line for line in text.split("## law (40")[1].splitlines() if line.startswith("| law "))
    assert "| +0.100 [+0.100, +0.100]*" in detail
    below = text.split("Published for law, not measured here:")[1]
    assert "| 0.4942        | 0.6270   | +26.9%" in below
    assert "0.2415" not in text
    other = benchmark_markdown(table, published, 0.975, 0.005, {})
    assert "at which no more than 0.5 % of" in other
    assert "97.5 % bootstrap" in other


def test_models_that_differ_in_the_seed_are_summed_up():
    base = scores([0.6] * 40, [0.5] * 40)
    rows = [{"base_model": "b", "model": "base", "results": measure(base, base, SETTINGS, 1)}]
    for seed, gain in enumerate((0.1, 0.2, 0.6)):
        model = base.assign(positive_similarity=base["positive_similarity"] + gain)
        rows.append({"base_model": "b", "model": f"law-{seed}", "results": measure(model, base, SETTINGS, 1)})
    text = benchmark_markdown(benchmark_table(rows, []), [], 0.95, 0.05, {"law-0": ["law-0", "law-1", "law-2"]})
    section = text.split("## Over seeds, base model b")[1].split("\n## ")[0]
    lines = [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == ["measured", "model", "seeds", "law"]
    assert lines[2] == ["Margin", "law-0", "3", "+0.300 [+0.100, +0.600]"]
    assert ["Margin on easy negatives (kind topic)", "law-0", "3", "+0.300 [+0.100, +0.600]"] in lines


def test_the_csv_marks_what_is_published(table):
    published = table[table["source"] != "measured"]
    assert set(published["test_set"]) == {"law"}
    assert published["low"].isna().all()
    assert "published: model card" in set(published["source"])


def test_published_margins_agree_with_their_published_gains():
    for entry in read_published(ROOT / "config/published.yaml"):
        if entry.margin is not None:
            assert entry.margin / entry.base_margin - 1 == pytest.approx(entry.relative_change, abs=2e-3)


def test_a_broken_published_file_is_named(tmp_path):
    (tmp_path / "p.yaml").write_text("margins: [{domain: law}]")
    with pytest.raises(ConfigError, match=r"p\.yaml: not a list of published margins"):
        read_published(tmp_path / "p.yaml")
