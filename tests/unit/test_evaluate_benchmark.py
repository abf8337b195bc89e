import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from cachelora.benchmark import Findings, benchmark_markdown, benchmark_table, holm
from cachelora.config import Evaluate
from cachelora.evaluate import join_testsets, measure
from cachelora.models import load_model, score_pairs, score_triplets
from cachelora.published import read_published
from cachelora.schemas import SCORES, THRESHOLDS

SETTINGS = Evaluate(bootstrap=500)


def scores(positive, negative, test_set="law"):
    """Scores of triplets, each a group of its own, of two kinds in turn."""
    rows = [
        (
            test_set,
            "v1",
            str(number),
            f"{number} {same}",
            same,
            ("aspect", "topic")[number % 2],
            str(number),
            cosine,
        )
        for number, pair in enumerate(zip(positive, negative, strict=True))
        for same, cosine in zip((True, False), pair, strict=True)
    ]
    return pd.DataFrame(rows, columns=SCORES.names)


def raised(table, by):
    """The same scores with the positives' raised."""
    return table.assign(similarity=table["similarity"] + by * table["same_answer"])


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
    ours = load_model(base, None)
    scored = score_pairs(ours, join_testsets({"x": table}), 2)[SCORES.names]
    anchor, positive, negative = map(embed, texts)
    expected = [anchor @ positive, anchor @ negative]
    assert scored["same_answer"].tolist() == [True, False]
    assert scored["similarity"].tolist() == pytest.approx(expected, abs=1e-5)
    row = score_triplets(ours, table, 2).iloc[0]
    assert row[["positive_similarity", "negative_similarity"]].tolist() == pytest.approx(expected, abs=1e-5)


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
    with pytest.raises(ValueError, match="not about the same pairs"):
        measure(scores([0.1], [0.2]), scores([0.1], [0.2], "medical"), SETTINGS, 1)


@pytest.fixture
def table():
    random = np.random.default_rng(2)
    base = scores(random.normal(0.6, 0.1, 40), random.normal(0.5, 0.1, 40))
    model = raised(base, 0.1)
    return benchmark_table(
        [
            {"base_model": "b", "model": "base", "results": measure(base, base, SETTINGS, 1)},
            {"base_model": "b", "model": "law", "results": measure(model, base, SETTINGS, 1)},
        ],
        read_published(ROOT / "config/published.yaml"),
    )


def findings(table, published=(), **more):
    return Findings(table, published, more.pop("deployed", "law"), 0.95, 0.05, **more)


def test_markdown_shows_models_changes_and_published_numbers_marked_as_such(table):
    published = read_published(ROOT / "config/published.yaml")
    text = benchmark_markdown(findings(table, published))
    assert "Over seeds" not in text
    assert "## law (40 triplets, v1), base model b" in text
    overview, *_ = (line for line in text.splitlines() if line.startswith("| law "))
    assert overview == "| law     | +0.100 [+0.100, +0.100]* |"
    lookalikes, easy = (text.split(f"## {title}")[1].split("## ")[0] for title in ("Accuracy on", "Margin on easy"))
    assert "| law     | +" in lookalikes
    assert overview in easy
    detail = next(line for line in text.split("## law (40")[1].splitlines() if line.startswith("| law "))
    assert "| +0.100 [+0.100, +0.100]*" in detail
    assert "0.4942" in text.split("## Published against measured")[1]
    other = benchmark_markdown(dataclasses.replace(findings(table), confidence=0.975, false_hit_budget=0.005))
    assert "at which no more than 0.5 % of" in other
    assert "97.5 % bootstrap" in other
    assert "Published against" not in other


def test_holm_by_hand_and_in_any_order():
    # Sorted: .01 x 4, .02 x 3, .03 x 2 = .06, .5; the third may not fall below the second.
    assert holm(np.array([0.02, 0.5, 0.01, 0.029])).tolist() == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm(np.array([0.4, 0.9])).tolist() == pytest.approx([0.8, 0.9])
    assert holm(np.array([])).tolist() == []


def test_a_star_is_for_what_is_not_by_chance_after_correction(table):
    rows = table[(table["source"] == "measured") & table["metric"].isin(["margin", "ap", "accuracy"])]
    tested = rows[rows["p"].notna()]
    assert (tested["p_holm"] >= tested["p"]).all()
    assert table.loc[~table["metric"].isin(["margin", "ap", "accuracy"]), "p_holm"].isna().all()
    # With its interval above zero and a p that is not small enough, there is no star.
    weak = table.assign(p_holm=table["p_holm"].where(table["p_holm"].isna(), 0.06))
    assert "+0.100 [+0.100, +0.100] " in benchmark_markdown(findings(weak))
    assert "]*" not in benchmark_markdown(findings(weak))


def test_the_advice_follows_from_the_table(table):
    text = benchmark_markdown(findings(table))
    assert "take `law`: its AP is significantly higher than the base model's on 1 of 1 test sets" in text
    turned = table.copy()
    numbers = ["change", "change_low", "change_high"]
    turned[numbers] = -turned[["change", "change_high", "change_low"]].to_numpy()
    text = benchmark_markdown(findings(turned))
    assert "look twice" in text
    assert "significantly worse than the base model on" in text
    unsure = benchmark_markdown(findings(table.assign(p_holm=table["p_holm"].where(table["p_holm"].isna(), 0.5))))
    assert "nothing speaks for `law`" in unsure


def replayed(model, *points):
    """A replay with a fixed threshold of .8 and points of (threshold, calls saved, false hits)."""
    names = ("threshold", "calls_saved", "false_hit_share")
    usual = {"label": "fixed", "budget": None, "hit_ratio": 0.4, "false_hits_of_hits": None}
    usual |= {"threshold": 0.8, "calls_saved": 0.3, "false_hit_share": 0.1}
    usual |= {f"{name}_{end}": None for name in (*names, "hit_ratio", "false_hits_of_hits") for end in ("low", "high")}
    stream = {"queries": 9, "intents": 2, "by_form": {"new": 2}, "best_hit_ratio": 0.7}
    frontier = [dict(zip(names, point, strict=True)) for point in points]
    return {"base_model": "b", "model": model, "thresholds": [usual], "frontier": frontier, "stream": stream}


def test_models_are_compared_in_the_replay_at_equal_false_hits_each_at_its_best(table):
    replays = {
        ("b", "base"): replayed("base", (0.6, 0.5, 0.2), (0.7, 0.45, 0.1), (0.8, 0.3, 0.1), (1.0, 0.2, 0.0)),
        ("b", "law"): replayed("law", (0.6, 0.65, 0.3), (0.7, 0.5, 0.09), (0.8, 0.4, 0.0), (1.0, 0.2, 0.0)),
    }
    text = benchmark_markdown(findings(table, replays=replays))
    assert "at 0.8 answers 10 % of the queries falsely" in text
    assert "it saves up to 45 % of the calls (at 0.70), and `law` 50 % of the calls (at 0.70)" in text
    assert "a cache that is never wrong would save 70 %, one that knows nothing but the same words 20 %" in text
    nowhere = replays | {("b", "law"): replayed("law", (0.6, 0.65, 0.3))}
    assert "In the replay, the base model" not in benchmark_markdown(findings(table, replays=nowhere))


def test_the_advice_tells_of_sets_on_which_the_model_is_worse(table):
    random = np.random.default_rng(3)
    base = scores(random.normal(0.6, 0.1, 40), random.normal(0.5, 0.1, 40), "elsewhere")
    other = benchmark_table(
        [
            {"base_model": "b", "model": "base", "results": measure(base, base, SETTINGS, 1)},
            {"base_model": "b", "model": "law", "results": measure(raised(base, -0.1), base, SETTINGS, 1)},
        ],
        [],
    )
    both = findings(pd.concat([table, other], ignore_index=True))
    assert "sets of other people's making" not in benchmark_markdown(both)
    everywhere = {"fitted_on": ["all", "fixed"], "budget": [0.05, np.nan], "threshold": [0.9, 0.8]}
    zeros = dict.fromkeys(set(THRESHOLDS.names) - {"test_set", *everywhere}, 0.0)
    fitted = pd.concat(
        [pd.DataFrame({"test_set": name, **everywhere}).assign(**zeros) for name in ("law", "all domains")]
    )
    text = benchmark_markdown(findings(pd.concat([table, other], ignore_index=True), thresholds={("b", "law"): fitted}))
    assert "take `law`: its AP is significantly higher than the base model's on 1 of 1 test sets" in text
    assert "`law` on b is significantly worse than the base model, elsewhere (margin -0.100)" in text


def test_what_was_too_little_to_test_is_not_called_bad():
    few = scores([0.9] * 9, [0.1] * 9)
    rows = [{"base_model": "b", "model": name, "results": measure(few, few, SETTINGS, 1)} for name in ("base", "law")]
    text = benchmark_markdown(findings(benchmark_table(rows, [])))
    assert "there is too little to test `law` on" in text


def test_models_that_differ_in_the_seed_are_summed_up():
    base = scores([0.6] * 40, [0.5] * 40)
    rows = [{"base_model": "b", "model": "base", "results": measure(base, base, SETTINGS, 1)}]
    for seed, gain in enumerate((0.1, 0.2, 0.6)):
        model = raised(base, gain)
        rows.append({"base_model": "b", "model": f"law-{seed}", "results": measure(model, base, SETTINGS, 1)})
    repeats = {"law-0": ["law-0", "law-1", "law-2"]}
    text = benchmark_markdown(findings(benchmark_table(rows, []), deployed="law-0", repeats=repeats))
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
