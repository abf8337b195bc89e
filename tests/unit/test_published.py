"""The seeds' margins, with our verdicts, beside what was measured."""

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from cachelora.errors import ConfigError
from cachelora.published import Published, published_table, read_published

SEEDS = ROOT.parent / "shared/seeds"


@pytest.fixture(scope="module")
def published():
    return read_published(ROOT / "config/published.yaml")


def entry(**values):
    given = {
        "domain": "medical", "source": "guide", "setup": "one adapter", "base_model": "L12", "relative_change": 0.2,
        "verdict": "contradicted", "because": "of another document",
    }  # fmt: skip
    return given | values


def measured(base_model="l6", models=("base", "joint"), test_set="five", low=0.05):
    rows = [
        {"source": "measured", "base_model": base_model, "model": model, "test_set": test_set, "kind": kind,
         "metric": metric, "n": 5, "value": 0.1687 + 0.1 * number, "low": None, "high": None,
         "change": 0.1 * number, "change_low": low, "change_high": 0.15}
        for number, model in enumerate(models)
        for kind in ("all", "topic")
        for metric in ("margin", "ap")
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"low": "float64", "high": "float64", "change_low": "float64"})


def test_margins_agree_with_gains_and_similarities(published):
    for row in published:
        if row.margin is not None:
            # What a document rounds to two digits can be off by as much.
            exact = round(row.margin, 2) != row.margin or round(row.base_margin, 2) != row.base_margin
            gain = row.margin / row.base_margin - 1
            assert gain == pytest.approx(row.relative_change, abs=2e-3 if exact else 0.04), row
        for margin, positive, negative in (
            (row.base_margin, row.base_positive_similarity, row.base_negative_similarity),
            (row.margin, row.positive_similarity, row.negative_similarity),
        ):
            if positive is not None and negative is not None:
                assert positive - negative == pytest.approx(margin, abs=2e-4), row


def test_averages_are_those_of_their_tables(published):
    for row in published:
        # The card's figure for the smaller base model is in passing, without its table.
        if row.domain == "average" and (row.source, row.base_model) != ("model card", "all-MiniLM-L6-v2"):
            setup = row.setup.removesuffix("s")
            parts = [
                other.relative_change
                for other in published
                if (other.source, other.setup, other.base_model) == (row.source, setup, row.base_model)
                and other.domain != "average"
            ]
            assert len(parts) >= 3
            assert sum(parts) / len(parts) == pytest.approx(row.relative_change, abs=1e-3), row


def test_what_is_measured_names_sets_of_the_public_preset_and_models_of_the_table(published, default_config):
    sets = yaml.safe_load((ROOT / "config/presets/public.yaml").read_text(encoding="utf-8"))["sets"]
    named = {(row.measured_on, row.measured_model) for row in published if row.measured_on}
    assert {test_set for test_set, _ in named} == {"seeds-five", "seeds-medical"} <= set(sets)
    assert {model for _, model in named} <= set(default_config.trained_models)


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the seeds' documents are not on this machine")
@pytest.mark.parametrize(
    ("document", "source"),
    [("000", "validation guide"), ("001", "README"), ("002", "evaluation report"), ("004", "model card")],
)
def test_every_figure_stands_in_its_document(published, document, source):
    (path,) = SEEDS.glob(f"{document}_*")
    text = path.read_text(encoding="utf-8").replace(",", "")
    for row in published:
        if row.source != source:
            continue
        if "computed" not in row.setup and "name of a margin" not in row.setup:
            assert f"{100 * row.relative_change:.1f}%" in text, row
        for name in ("base_margin", "margin", "base_positive_similarity", "base_negative_similarity"):
            if (value := getattr(row, name)) is not None:
                assert (f"{value:.4f}" in text) or (f"{value:.2f}" in text and round(value, 2) == value), (name, row)
        if row.n is not None and row.n > 5:
            assert str(row.n) in text, row


def test_ours_stands_beside_theirs_where_the_table_holds_the_same_set():
    rows = [
        Published(**entry(measured_on="five", measured_model="joint", n=5, base_margin=0.1732, margin=0.2102)),
        Published(**entry(domain="law", verdict="not reproducible")),
    ]
    table = published_table(rows, measured())
    ours, none = table.to_dict("records")
    assert ours["published base margin"] == "0.1732" and ours["published change"] == "+20.0%" and ours["n"] == "5"
    assert ours["measured base margin"] == "0.1687" and ours["measured margin"] == "0.2687"
    assert ours["measured change"] == "+0.1000 [+0.0500, +0.1500]*"
    assert (ours["measured n"], ours["measured on"]) == ("5", "five, l6, joint")
    assert {name: text for name, text in none.items() if text and name.startswith("measured")} == {}
    assert (none["verdict"], none["because"]) == ("not reproducible", "of another document")


def test_a_change_is_marked_only_where_its_interval_excludes_zero():
    rows = [Published(**entry(measured_on="five", measured_model="joint"))]
    assert published_table(rows, measured(low=-0.05))["measured change"].item() == "+0.1000 [-0.0500, +0.1500]"
    assert published_table(rows, measured(low=None))["measured change"].item() == "+0.1000"


def test_each_base_model_has_a_row_and_a_model_that_is_not_there_leaves_its_cells_empty():
    rows = [Published(**entry(measured_on="five", measured_model="joint"))]
    table = published_table(rows, pd.concat([measured(), measured("l12", models=("base",))]))
    assert table["measured on"].tolist() == ["five, l6, joint", "five, l12"]
    assert table["measured margin"].tolist() == ["0.2687", ""]
    elsewhere = published_table(rows, measured(test_set="law"))
    assert len(elsewhere) == 1 and elsewhere["measured on"].item() == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("margins: [{domain: law}]", r"p\.yaml: not a list of published margins"),
        ("- 1", r"p\.yaml: not a list of published margins"),
        (yaml.safe_dump({"margins": [entry(verdict="true")]}), "not a list of published margins .*verdict"),
        (yaml.safe_dump({"margins": [entry(measured_on="five")]}), "measured_on and measured_model are given together"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_published(tmp_path / "p.yaml")
