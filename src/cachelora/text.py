"""Normal forms, identities and near copies of query texts."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

# Marks that carry no meaning at the edge of a word. Signs that do are not in it: c++, c#, -1, .net, 50%, $5.
_EDGE_MARKS = "?!,;:\"'()[]{}…‘’“”«»¿¡"  # noqa: RUF001

BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the text around them, for example in a report."""

_WORD = re.compile(r"[^\W_]+(?:[.,][^\W_]+)*[+#%]*")
# Unicode's category Cc.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTRACTIONS = (
    (r"\bcan(?:['’]t|not)\b", "can not"),  # noqa: RUF001
    (r"\bwon['’]t\b", "will not"),  # noqa: RUF001
    (r"n['’]t\b", " not"),  # noqa: RUF001
    (r"['’](?:s|m|d|ll|re|ve)\b", ""),  # noqa: RUF001
)
# fmt: off
_MEANINGFUL_STOP_WORDS = frozenset((
    "above", "after", "before", "below", "down", "during", "except", "first", "last", "least", "less", "more",
    "never", "no", "none", "not", "off", "only", "out", "over", "under", "until", "up", "without",
))
# fmt: on


def normalise(text: str) -> str:
    """Return the text in Unicode NFC with control characters and runs of white space as single blanks.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    str
        The cleaned text; empty if there was nothing but white space.
    """
    text = unicodedata.normalize("NFC", text)
    return " ".join(_CONTROL.sub(" ", text).split())


def on_one_line(text: str) -> str:
    """Return a text for showing: on one line, and without the marks that turn the text around them.

    Parameters
    ----------
    text : str
        Of a query or an LLM.

    Returns
    -------
    str
        What is left of it.
    """
    return "".join(character for character in normalise(text) if character not in BIDI)


def trivial_key(text: str) -> str:
    """Return a key that texts share when they differ in case, spacing or marks around words only.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    str
        The key; empty if the text holds no word.
    """
    words = unicodedata.normalize("NFKC", normalise(text)).casefold().split()
    return " ".join(bare for word in words if (bare := word.lstrip(_EDGE_MARKS).rstrip(_EDGE_MARKS + ".")))


def content_words(text: str) -> set[str]:
    """Return the stems of the words of a text that carry its content.

    Parameters
    ----------
    text : str
        An English text.

    Returns
    -------
    set of str
        Stems (Snowball's English stemmer) of its words and numbers but for scikit-learn's English stop words; those
        that negate or give a direction, such as "without" or "before", count as content.
    """
    plain = trivial_key(text)
    for short, full in _CONTRACTIONS:
        plain = re.sub(short, full, plain)
    stop_words = _stop_words()
    return {_stem(word) for word in _WORD.findall(plain) if word not in stop_words}


@cache
def _stop_words() -> frozenset[str]:
    """Return the words that carry no content."""
    # Imported here: most stages need none.
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS - _MEANINGFUL_STOP_WORDS


@cache
def _stemmer() -> Any:
    """Return the stemmer."""
    import snowballstemmer

    return snowballstemmer.stemmer("english")


# Most of the time that comparing words takes is the stemmer's.
@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    """Return the stem of a word."""
    return _stemmer().stemWord(word)


def digest(text: str) -> str:
    """Return 16 hexadecimal digits that identify a text.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    str
        The first 64 bits of its SHA-256.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def connected_groups(rows: Sequence[Sequence[str]]) -> list[str]:
    """Group rows of texts: two rows that share a text, directly or through others, are in one group.

    Parameters
    ----------
    rows : sequence of sequence of str, length n
        The keys of the texts of each row, at least one a row.

    Returns
    -------
    list of str, length n
        For each row the digest of the alphabetically first text of its group.
    """
    if not len(rows):
        return []
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names = {text: number for number, text in enumerate(dict.fromkeys(text for row in rows for text in row))}
    pairs = [(names[row[0]], names[text]) for row in rows for text in row]
    ones = np.ones(len(pairs), dtype=bool)
    graph = coo_array((ones, tuple(zip(*pairs, strict=True))), shape=(len(names), len(names)))
    _, component = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    for text, number in names.items():
        first[component[number]] = min(text, first.get(component[number], text))
    return [digest(first[component[names[row[0]]]]) for row in rows]


def near_copies(texts: Sequence[str], references: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Find the texts that are copies, or nearly, of one of the references.

    The measure is the Jaccard similarity of the sets of character trigrams within words, of the trivial keys.

    Parameters
    ----------
    texts : sequence of str, length n
        The texts to judge.
    references : sequence of str, length m
        The texts to compare with.
    threshold : float
        Least similarity of a near copy, in (0, 1].

    Returns
    -------
    list of (int, int, float)
        Number of the text, number of the reference and similarity of each pair that reaches the threshold, by text.
    """
    if not len(texts) or not len(references):
        return []
    # Imported here: it costs a second that the stages which do not compare texts need not pay.
    from sklearn.feature_extraction.text import CountVectorizer

    # The "a" keeps the vocabulary from being empty when no reference has a word; its row is dropped.
    vectorizer = CountVectorizer(analyzer="char_wb", ngram_range=(3, 3), binary=True, lowercase=False)
    trigrams = vectorizer.build_analyzer()
    keys = [f"{trivial_key(text)} " for text in references]
    reference = vectorizer.fit_transform([*keys, "a"])[:-1].astype(np.int32)
    reference_sizes = np.asarray([len(set(trigrams(key))) for key in keys])
    found = []
    for start in range(0, len(texts), 1024):
        chunk = [f"{trivial_key(text)} " for text in texts[start : start + 1024]]
        sizes = np.asarray([len(set(trigrams(key))) for key in chunk])
        shared = (vectorizer.transform(chunk).astype(np.int32) @ reference.T).tocoo()
        row, column = shared.coords
        similarity = shared.data / (sizes[row] + reference_sizes[column] - shared.data)
        # Both sides are ratios of small integers; the slack is for a threshold such as 0.7 that floats cannot hold.
        alike = np.flatnonzero(similarity >= threshold - 1e-9)
        alike = alike[np.lexsort((column[alike], row[alike]))]
        found += [(start + int(row[k]), int(column[k]), float(similarity[k])) for k in alike]
    return found
