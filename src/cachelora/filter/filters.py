"""The filters: each a small function of a text beside its query, with a threshold of the same name in the config.

To add one: write the function, name it in :data:`FILTERS`, and give :class:`cachelora.config.Filters` its threshold.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rapidfuzz import fuzz

from cachelora.filter.lexical import changed_name, changed_negation, changed_number, differs, shared_words
from cachelora.text import trivial_key

# Not an abbreviation, such as "p.m." or "etc.".
_SENTENCE_END = re.compile(r"^[^?]*[^\W\d_]{3,}(?<!\betc)\.$")
_MOST_WORDS = 0.6
_ASKS = re.compile(
    r"(?:what|how|why|when|where|which|who|whose|is|are|was|were|do|does|did|can|could|should|would|will|may|must|has"
    r"|have|am|if)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A text, and what it is judged by.

    Attributes
    ----------
    query : str
        The canonical query that it was written for.
    text : str
        The text.
    similarity : float
        Cosine of the two by the base model.
    paraphrases : tuple of str
        For a negative, the query's paraphrases that were kept.
    to_paraphrases : tuple of float
        Its cosines with them.
    positives : tuple of float
        Their cosines with the query.
    elsewhere : float
        For a negative, its highest cosine with another query of the domain or a paraphrase of that; -1 without any.
    """

    query: str
    text: str
    similarity: float
    paraphrases: tuple[str, ...] = ()
    to_paraphrases: tuple[float, ...] = ()
    positives: tuple[float, ...] = ()
    elsewhere: float = -1.0


def trivial_edit(pair: Pair, threshold: float) -> bool:
    """Say whether a text is nearly the query's letters, and no word of it tells of a difference."""
    alike = fuzz.ratio(trivial_key(pair.query), trivial_key(pair.text)) / 100
    return alike >= threshold and not differs(pair.query, pair.text)


def length_ratio(pair: Pair, threshold: float) -> bool:
    """Say whether a text is many times longer than its query, or shorter."""
    return not 1 / threshold <= len(pair.text) / max(1, len(pair.query)) <= threshold


def fragment(pair: Pair, threshold: float) -> bool:
    """Say whether a text has too few words to ask what a query of twice as many, or more, asks."""
    words = len(trivial_key(pair.text).split())
    return words < threshold and 2 * words < len(trivial_key(pair.query).split())


def statement(pair: Pair, threshold: float) -> bool:
    """Say whether a sentence with a full stop, which asks nothing, stands for a query without one."""
    del threshold
    text = pair.text.rstrip()
    return bool(_SENTENCE_END.search(text)) and not pair.query.rstrip().endswith(".") and not _ASKS.match(text)


def repetition(pair: Pair, threshold: float) -> bool:
    """Say whether so many words in a row stand twice in a text that has them once at most in its query."""
    before, after = _runs(pair.query, int(threshold)), _runs(pair.text, int(threshold))
    return any(number > 1 and before[run] < number for run, number in after.items())


def _runs(text: str, length: int) -> Counter[tuple[str, ...]]:
    """Count the runs of so many words."""
    words = trivial_key(text).split()
    return Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def number(pair: Pair, threshold: float) -> bool:
    """Say whether a paraphrase that keeps a share of the query's words has another number."""
    return changed_number(pair.query, pair.text) and shared_words(pair.query, pair.text) >= threshold


def negation(pair: Pair, threshold: float) -> bool:
    """Say whether a paraphrase that keeps a share of the query's words has lost or gained a negation."""
    return changed_negation(pair.query, pair.text) and shared_words(pair.query, pair.text) >= threshold


def name(pair: Pair, threshold: float) -> bool:
    """Say whether a paraphrase that keeps a share of the query's words has another name, version or identifier."""
    return changed_name(pair.query, pair.text) and shared_words(pair.query, pair.text) >= threshold


def far(pair: Pair, threshold: float) -> bool:
    """Say whether a paraphrase is farther from its query than the words that it keeps let expect.

    Base models know few synonyms, so a good paraphrase in other words may be far; one in the same words may not. The
    threshold holds for texts that share 60 % of their words, and falls with that share.
    """
    return pair.similarity < threshold * min(1.0, shared_words(pair.query, pair.text) / _MOST_WORDS)


def easy(pair: Pair, threshold: float) -> bool:
    """Say whether a negative is too far from its query to be hard."""
    return pair.similarity < threshold


def same_words(pair: Pair, threshold: float) -> bool:
    """Say whether a negative shares the query's words to that degree, and no word of it tells of a difference."""
    return shared_words(pair.query, pair.text) >= threshold and not differs(pair.query, pair.text)


def near_equal(pair: Pair, threshold: float) -> bool:
    """Say whether a negative nearly equals the query or a paraphrase, and no word of it tells of a difference."""
    return any(
        similarity >= threshold and not differs(text, pair.text)
        for text, similarity in zip(
            (pair.query, *pair.paraphrases), (pair.similarity, *pair.to_paraphrases), strict=True
        )
    )


def elsewhere(pair: Pair, threshold: float) -> bool:
    """Say whether a negative nearly equals another query of the domain, or a paraphrase of it.

    In a batch with that other query, it would push the query away from itself.
    """
    return pair.elsewhere >= threshold


def above_positive(pair: Pair, threshold: float) -> bool:
    """Say whether a negative is nearer to its query than a share of the nearest paraphrase, without a word to tell why.

    TopK-PercPos of NV-Retriever (Moreira et al. 2024, arXiv:2407.15831, section 3.2) takes every such negative for a
    false one. Base models rank many a true look-alike above true paraphrases, so one with a telling word stays.
    """
    if not pair.positives or pair.similarity < threshold * max(pair.positives):
        return False
    return not differs(pair.query, pair.text, pair.paraphrases)


class TextFilter(NamedTuple):
    """A filter.

    Attributes
    ----------
    drops : callable
        Says of a pair and a threshold whether the text is dropped.
    of : str
        What it is for: ``paraphrase``, ``negative`` or ``text`` for both.
    reason : str
        Why, as the data card has it.
    by_similarity : bool
        Whether it asks the base model.
    """

    drops: Callable[[Pair, float], bool]
    of: str
    reason: str
    by_similarity: bool = False


FILTERS = {
    "trivial_edit": TextFilter(trivial_edit, "text", "the query's letters with a trivial edit"),
    "length_ratio": TextFilter(length_ratio, "text", "much longer or shorter than the query"),
    "fragment": TextFilter(fragment, "text", "a fragment, not a query"),
    "statement": TextFilter(statement, "negative", "a statement, not a query"),
    "repetition": TextFilter(repetition, "negative", "words in a row that stand twice"),
    "number": TextFilter(number, "paraphrase", "another number"),
    "negation": TextFilter(negation, "paraphrase", "a negation lost or gained"),
    "name": TextFilter(name, "paraphrase", "another name, version or identifier"),
    "far": TextFilter(far, "paraphrase", "too far from the query", by_similarity=True),
    "easy": TextFilter(easy, "negative", "too far from the query to be hard", by_similarity=True),
    "same_words": TextFilter(same_words, "negative", "the query's words, and none that differs"),
    "near_equal": TextFilter(near_equal, "negative", "nearly equal to the query or a paraphrase", by_similarity=True),
    "elsewhere": TextFilter(
        elsewhere, "negative", "nearly equal to another query or its paraphrase", by_similarity=True
    ),
    "above_positive": TextFilter(
        above_positive, "negative", "nearer than the paraphrases, and no word that differs", by_similarity=True
    ),
}
"""The filters by name, in the order in which they are counted."""
