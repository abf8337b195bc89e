import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from cachelora.text import content_words, digest, near_copies, normalise, trivial_key

texts = st.text(max_size=60)


@given(texts)
@example("a\u0000b\tc\r\nd")
def test_normalise_is_idempotent_and_leaves_no_control_character(text):
    clean = normalise(text)
    assert normalise(clean) == clean
    assert clean == clean.strip()
    assert not any(unicodedata.category(c) == "Cc" for c in clean)


@given(texts)
def test_trivial_key_ignores_case_spacing_and_marks(text):
    key = trivial_key(text)
    assert trivial_key(f"  {text} ") == key
    assert trivial_key(f"{text} ?") == key
    assert trivial_key(key) == key


def test_trivial_key_keeps_signs_that_carry_meaning():
    queries = ["sort in c", "sort in c#", "sort in c++", "sort -1", "sort 1", "50% off", "50 off", ".net", "net"]
    assert len({trivial_key(query) for query in queries}) == len(queries)
    assert trivial_key("What is gout?") == trivial_key("what is  gout") == trivial_key('"What is gout".')


def test_digest_does_not_change():
    # Query ids and splits hang on it: a change would re-run, and re-pay, everybody's augmentation.
    assert digest("what is gout") == "374d3fb35bac9644"


def test_near_copies_finds_copies_and_leaves_look_alikes_of_other_meaning_alone():
    references = ["How long does the shingles vaccine protect you?", "enable 2FA on github"]
    found = near_copies(
        [
            "how long does the shingles vaccine protect you",
            "How long does the shingles vaccines protect you?",
            "What are the symptoms of shingles?",
            "",
        ],
        references,
        0.75,
    )
    assert [(text, reference) for text, reference, _ in found] == [(0, 0), (1, 0)]
    assert found[0][2] == 1.0
    assert 0.75 <= found[1][2] < 1


@given(st.lists(texts, max_size=6), st.lists(texts, max_size=6))
def test_near_copies_at_threshold_one_agrees_with_sets_of_trigrams(texts_, references):
    def trigrams(text):
        return {f" {w} "[i : i + 3] for w in trivial_key(text).split() for i in range(max(1, len(w)))}

    found = {text for text, _, _ in near_copies(texts_, references, 1.0)}
    assert found == {
        number
        for number, text in enumerate(texts_)
        if any(trigrams(text) and trigrams(text) == trigrams(reference) for reference in references)
    }


def test_content_words_are_stems_without_fillers_but_with_negations_and_directions():
    words = content_words("How do I upgrade to Python 3.12 without breaking C++ or C#? It's 50% off, and I don't mind")
    assert words == {"upgrad", "python", "3.12", "without", "break", "c++", "c#", "50%", "off", "not", "mind"}
    assert content_words("upgrading, upgraded, upgrades") == {"upgrad"}
    assert content_words("?") == set()
    assert content_words("can't") == content_words("cannot") == content_words("won't") == {"not"}
