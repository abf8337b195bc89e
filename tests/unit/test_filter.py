"""The filters, on pairs whose verdict is plain, and the stage on the real base model."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachelora.config import Filter, Filters
from cachelora.filter import filter_texts
from cachelora.filter.filters import FILTERS, Pair
from cachelora.filter.lexical import changed_name, changed_negation, changed_number, differs, numbers_of
from cachelora.filter.nearest import nearest_of_others
from cachelora.filter.rule_made import rule_made_negatives
from cachelora.models import load_model
from cachelora.queries import group_queries
from cachelora.schemas import AUGMENTED, FILTERED, MINED, PARAPHRASE


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, None)


def queries_table(texts, split="train"):
    return group_queries(list(texts)).assign(split=split)


def augmented_table(table, written):
    """Rows of query, kind and text."""
    name = dict(zip(table["query"], table["query_id"], strict=True))
    return pd.DataFrame([(name[q], kind, text, "e", "m", "v") for q, kind, text in written], columns=AUGMENTED.names)


def dropped(model, written, settings=None, queries=()):
    """Filter what was written, and return the reasons by text."""
    table = queries_table(dict.fromkeys([*(q for q, _, _ in written), *queries]))
    found = filter_texts(table, augmented_table(table, written), settings or Filter(), model, bfloat16=False)
    assert list(found.columns) == FILTERED.names
    return {row.text: row.reasons for row in found.itertuples()}


@pytest.mark.parametrize(
    ("query", "text", "changed"),
    [
        ("dose for 10 kg", "dose for 20 kg", True),
        ("dose for 10 kg", "how much for 10000 g", False),
        ("cough for 2 weeks", "14 days of coughing", False),
        ("cough for 2 weeks", "coughing for a fortnight", False),
        ("cough for 2 weeks", "coughing since 3 days", True),
        ("at 4 khz", "at 4000 Hz", False),
        ("fine of $3,000", "a 3000 dollar fine", False),
        ("eta .06 small", "is 0.06 small", False),
        ("type 2 diabetes", "adult-onset diabetes", True),
        ("python 3.8.1", "python 3.8.2", True),
        ("C++17 views", "views in C++20", False),
        ("ibuprofen 100 mg", "ibuprofen 110 mg", True),
        ("30 weeks pregnant", "32 weeks pregnant", True),
        ("how much sleep does a 14 year old need", "sleep needed at age 14", False),
    ],
)
def test_numbers_are_compared_in_whatever_unit(query, text, changed):
    assert changed_number(query, text) is changed
    assert changed_number(text, query) is changed


def test_negations_and_names_are_compared():
    assert changed_negation("why does it not work", "why does it work")
    assert changed_negation("I can't log in", "I can log in")
    assert changed_negation("why shouldnt i mix it", "why should i mix it")
    assert not changed_negation("is it in range or not", "is it in range")
    assert not changed_negation("no sugar", "without sugar")
    assert changed_name("sort a list in numpy.sort", "sort a list with pandas.sort")
    assert changed_name("MRI of the knee", "CT of the knee")
    assert not changed_name("magnetic resonance imaging of the knee", "MRI of the knee")
    assert not changed_name("high blood pressure", "HBP")


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("rollback the last migration", "rollback the last two migrations"),
        ("top of the tooth", "bottom of the tooth"),
        ("convert json to yaml", "convert yaml to json"),
        ("-2.50 sphere", "+2.50 sphere"),
        ("php == and ===", "php == and =>"),
        ("treatment of asthma", "symptoms of asthma"),
        ("why does it run", "when does it run"),
        ("pg_dump only the schema without the data", "pg_dump only the data without the schema"),
        ("can i eat eggs", "can i not eat eggs"),
    ],
)
def test_a_telling_word_is_seen(query, text):
    assert differs(query, text)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("how to move a server", "How can I move the server?"),
        ("what is the treatment of asthma", "asthma treatment"),
        ("symptoms of covid-19", "symptoms of covid 19"),
        ("salt & pepper", "salt and pepper"),
    ],
)
def test_other_small_words_tell_nothing(query, text):
    assert not differs(query, text)
    assert not differs(text, query)


def test_words_of_a_paraphrase_are_no_difference():
    assert differs("high blood pressure treatment", "hypertension treatment")
    assert not differs("high blood pressure treatment", "hypertension treatment", ("therapy of hypertension",))
    assert differs("high blood pressure treatment", "hypotension treatment", ("therapy of hypertension",))


def pair(query="how do I reset the password of my account", text="x", similarity=0.6, **rest):
    return Pair(query, text, similarity, **rest)


CASES = {
    "trivial_edit": (pair(text="How do I reset the password of the account"), pair(text="password reset, how?")),
    "length_ratio": (pair(text="reset"), pair(text="reset password")),
    "fragment": (pair(text="password"), pair(text="reset my password")),
    "statement": (pair(text="The password is reset in the settings."), pair(text="Tell me how to reset it")),
    "repetition": (pair(text="reset my pin and my pin again"), pair(text="reset my pin and my code")),
    "number": (pair("dose for 10 kg child", "dose for 12 kg child"), pair("dose for 10 kg", "ten kilo child, dose")),
    "negation": (
        pair("why is the backup of my old phone not working", "why is the backup of my old phone working"),
        pair("why is it not working", "it broke, why"),
    ),
    "name": (pair("sort in numpy.sort fast", "sort in pandas.sort fast"), pair("sort in numpy.sort", "order it")),
    "far": (pair("reset my password", "my password was reset", 0.6), pair("reset my password", "new login", 0.3)),
    "easy": (pair(similarity=0.1), pair(similarity=0.4)),
    "same_words": (pair("reset a password", "how to reset the password"), pair("reset a password", "set a password")),
    "near_equal": (
        pair("a", "reset the password", paraphrases=("password reset",), to_paraphrases=(0.99,), positives=(0.5,)),
        pair("reset the password", "reset the pin", 0.99),
    ),
    "elsewhere": (pair(elsewhere=0.99), pair(elsewhere=0.9)),
    "above_positive": (
        pair("high blood pressure cure", "hypertension cure", 0.8, paraphrases=("hypertension therapy",),
             to_paraphrases=(0.8,), positives=(0.7,)),
        pair("high blood pressure cure", "low blood pressure cause", 0.8, paraphrases=("hypertension therapy",),
             to_paraphrases=(0.3,), positives=(0.7,)),
    ),
}  # fmt: skip


def test_every_filter_has_a_threshold_and_a_case():
    assert [*FILTERS] == [*Filters.model_fields] == [*CASES]


@pytest.mark.parametrize("name", CASES)
def test_a_filter_drops_what_it_is_for_and_nothing_else(name):
    threshold = Filters().thresholds[name]
    bad, good = CASES[name]
    assert FILTERS[name].drops(bad, threshold)
    assert not FILTERS[name].drops(good, threshold)


@given(st.text(max_size=60), st.text(min_size=1, max_size=60), st.floats(-1, 1))
def test_no_text_breaks_a_filter(query, text, similarity):
    for name, threshold in Filters().thresholds.items():
        FILTERS[name].drops(Pair(query or "q", text, similarity, (text,), (similarity,), (0.5,), similarity), threshold)
    numbers_of(text)
    rule_made_negatives(text)


def test_texts_are_judged_by_words_and_by_the_base_model(model):
    query = "how do I lower high blood pressure without medicine"
    found = dropped(model, [
        (query, "aspect", "what causes high blood pressure"),
        (query, "aspect", "banana bread recipe with walnuts"),
        (query, "aspect", "How do I lower high blood pressure, without medicine?"),
        (query, "scope", "how can I lower the high blood pressure without medicine"),
        (query, "entity", "natural ways of lowering hypertension"),
        (query, PARAPHRASE, "natural ways of lowering hypertension"),
        (query, PARAPHRASE, "Natural ways of lowering hypertension!"),
        (query, PARAPHRASE, "getting hypertension down without drugs"),
    ])  # fmt: skip
    assert found["what causes high blood pressure"] == []
    assert found["getting hypertension down without drugs"] == []
    assert "easy" in found["banana bread recipe with walnuts"]
    assert found["How do I lower high blood pressure, without medicine?"][0] == "copy"
    assert {"same_words", "near_equal"} <= {*found["how can I lower the high blood pressure without medicine"]}
    assert found["Natural ways of lowering hypertension!"] == ["duplicate"]


def test_a_text_that_is_both_stays_a_paraphrase(model):
    query, text = "how do I lower high blood pressure", "natural ways of lowering hypertension"
    table = queries_table([query])
    written = [(query, "entity", text), (query, PARAPHRASE, text)]
    found = filter_texts(table, augmented_table(table, written), Filter(), model, bfloat16=False)
    assert [(row.kind, row.reasons[:1]) for row in found.itertuples()] == [(PARAPHRASE, []), ("entity", ["duplicate"])]


def test_a_negative_that_is_another_query_is_dropped_and_a_filter_can_be_off(model):
    one, other = "symptoms of diabetes in adults", "treatment of diabetes in adults"
    written = [(one, "aspect", "the treatment of diabetes in adults"), (one, "aspect", "causes of diabetes in adults")]
    found = dropped(model, written, queries=[other])
    assert found == {written[0][2]: ["elsewhere"], written[1][2]: []}
    off = Filter(filters=Filters(elsewhere=None))
    assert dropped(model, written, off, queries=[other])[written[0][2]] == []


def test_rule_made_and_mined_negatives_join_marked_and_filtered(model):
    queries = [f"how do I {verb} two factor login" for verb in ("enable", "test", "explain")]
    written = [(query, PARAPHRASE, f"{query} on my account") for query in queries]
    table = queries_table(queries)
    settings = Filter(rule_made=1, mined=1, mined_share=0.99)
    found = filter_texts(table, augmented_table(table, written), settings, model, bfloat16=False)
    rule = found[found["source"] == "rule"]
    assert rule["text"].tolist() == ["how do I disable two factor login"]
    assert rule["kind"].tolist() == ["polarity"]
    mined = found[found["source"] == "mined"]
    assert {*mined["kind"]} == {MINED}
    name = dict(zip(table["query_id"], table["query"], strict=True))
    assert len(mined) and all(row.text in queries and row.text != name[row.query_id] for row in mined.itertuples())
    # No split borrows from another.
    splits = ["train", "train", "validation"]
    mixed = filter_texts(table.assign(split=splits), augmented_table(table, written), settings, model, bfloat16=False)
    split = dict(zip(table["query"], splits, strict=True))
    rows = mixed[mixed["source"] == "mined"]
    assert len(rows) and all(split[row.text] == split[name[row.query_id]] for row in rows.itertuples())
    # What is held out for the test gets none, and is mined for nobody.
    held = filter_texts(table.assign(split="test"), augmented_table(table, written), settings, model, bfloat16=False)
    assert {*held["source"]} == {"llm"}


def test_queries_without_texts_are_no_error(model):
    table = queries_table(["a b c", "d e f"])
    found = filter_texts(table, augmented_table(table, []), Filter(rule_made=1, mined=1), model, bfloat16=False)
    assert len(found) == 0


@pytest.mark.parametrize(
    ("query", "made"),
    [
        ("how to enable 2FA", ["how to disable 2FA"]),
        ("Enable logging in nginx", ["Disable logging in nginx"]),
        ("why does my code not compile", ["why does my code compile"]),
        ("why can't i log in", ["why can i log in"]),
        ("can i not pay rent", []),
        ("how do I tell whether or not it runs", []),
        ("convert json to yaml", ["convert yaml to json"]),
        ("from 9 to 5", []),
        ("enable or disable it", []),
        ("python 3.8 release notes", ["python 3.6 release notes"]),
        ("process using port 8080", []),
        ("what does c++17 bring", []),
        ("how to d\u0131sable 2fa", []),
        ("why ain't it running", []),
        ("how to raise an exception", []),
        ("windows 10 blue screen", []),
        ("dose of 500 mg", ["dose of 1000 mg"]),
    ],
)
def test_rules_make_negatives_where_they_are_safe(query, made):
    found = [text for _, text in rule_made_negatives(query)]
    assert found == made
    assert all(differs(query, text) for text in found)


@given(st.integers(2, 40), st.integers(0, 2**31))
def test_the_nearest_of_others_is_found(size, seed):
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(size, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    owners = draw.integers(0, 3, size)
    found = nearest_of_others(vectors, owners, vectors, owners, size)
    cosines = np.where(owners[:, None] == owners[None], -1.0, vectors @ vectors.T)
    assert found == pytest.approx(cosines.max(axis=1), abs=1e-5)


def test_the_index_of_a_large_pool_finds_what_is_nearly_equal():
    draw = np.random.default_rng(1)
    pool = draw.normal(size=(30_000, 16)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    near = pool[::100] + draw.normal(size=(300, 16)).astype(np.float32) * 0.01
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    found = nearest_of_others(near, np.full(300, -1), pool, np.arange(30_000), 3)
    assert (found > 0.99).mean() > 0.99
