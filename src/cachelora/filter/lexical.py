"""What the words of two texts say about each other: the checks that need no model."""

import re
from functools import lru_cache
from typing import NamedTuple

from cachelora.text import content_words, trivial_key

# fmt: off
_SMALL = {
    word: number for number, word in enumerate((
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    ))
}
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_MULTIPLES = {"hundred": 100, "thousand": 1000, "k": 1000, "grand": 1000, "million": 10**6, "billion": 10**9}
_OTHER_NUMBERS = frozenset((
    "half", "quarter", "third", "dozen", "couple", "pair", "both", "once", "twice", "double", "triple", "single",
    "first", "second", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "ii", "iii", "iv", "vi",
    "point", "fortnight", "decade", "noon", "midnight", "teenager", "teen",
))
# What people write in one unit and then in another.
_UNITS = {
    "min": ("minute", 1), "minute": ("minute", 1), "h": ("minute", 60), "hr": ("minute", 60), "hour": ("minute", 60),
    "day": ("minute", 1440), "week": ("minute", 10080), "month": ("minute", 43800), "year": ("minute", 525600),
    "mcg": ("gram", 1e-6), "mg": ("gram", 1e-3), "g": ("gram", 1), "gram": ("gram", 1), "kg": ("gram", 1000),
    "kilo": ("gram", 1000), "mm": ("metre", 1e-3), "cm": ("metre", 0.01), "m": ("metre", 1), "km": ("metre", 1000),
    "ml": ("litre", 1e-3), "l": ("litre", 1), "hz": ("hertz", 1), "khz": ("hertz", 1000),
    "ms": ("second", 1e-3), "s": ("second", 1), "kb": ("byte", 1 / 1024), "mb": ("byte", 1), "gb": ("byte", 1024),
}
# fmt: on
# A number with letters or a hash before it belongs to a name.
_NUMBER_OR_WORD = re.compile(r"(?<![\w#+])\.?\d+(?:[.,:/]\d+)*|[^\W\d_]+")
# Also as people type it.
_NEGATION = re.compile(
    r"\b(?:not?|never|none|nothing|nobody|without|cannot|(?:do|does|did|is|are|was|were|ca|could|wo|would|have|has|had|should|must|need|ai)nt)\b"
    r"|n['’]t\b",  # noqa: RUF001
    re.IGNORECASE,
)
# Which question it is, where that is plain; "what" and "which" may be any.
_QUESTION = re.compile(r"\b(why|when|where|who|how (?:much|many|long|often|far|old|soon)|how)\b", re.IGNORECASE)
_CHOICE = re.compile(r"\b(?:or|vs|versus|and)\b", re.IGNORECASE)
_LEAST_TO_EXCHANGE = 4
# What people do not spell in another way: it holds a digit and a letter, a sign inside, or capitals after the first.
_NAME = re.compile(r"(?<![\w.])(?:[A-Z]{2,}s?\b|\w+(?:[._]\w+)+\(?|[A-Za-z]+\d[\w.]*|[a-z]+[A-Z]\w*|[A-Za-z]+[#+]+)")
_DIRECTION = frozenset(("from", "to", "into", "onto", "before", "after", "than", "over", "under", "with", "by", "for"))
# Words that stop lists hold, and that change an answer.
# fmt: off
_TELLING = frozenset((
    "all", "back", "both", "bottom", "few", "front", "many", "most", "other", "same", "several", "side", "top", "who",
    *_SMALL, *_TENS,
)) - {"one"}
# fmt: on
_UNIT_SLACK = 0.1


@lru_cache(maxsize=200_000)
def words_of(text: str) -> frozenset[str]:
    """Return the content words of a text, kept for the next comparison.

    Parameters
    ----------
    text : str
        An English text.

    Returns
    -------
    frozenset of str
        As :func:`cachelora.text.content_words`.
    """
    return frozenset(content_words(text))


class Number(NamedTuple):
    """A number in a text.

    Attributes
    ----------
    value : float or str
        Its value; of a date or a version, its text.
    dimension : str
        What its unit measures, as the unit that it is converted to; empty without a unit that is known.
    unit : str
        Its unit as it stands.
    factor : float
        By which the value is multiplied to convert it.
    """

    value: float | str
    dimension: str = ""
    unit: str = ""
    factor: float = 1.0


@lru_cache(maxsize=200_000)
def numbers_of(text: str) -> tuple[Number, ...]:
    """Return the numbers that a text writes in digits.

    Parameters
    ----------
    text : str
        An English text.

    Returns
    -------
    tuple of Number
        In the order of the text.
    """
    tokens = _NUMBER_OR_WORD.findall(trivial_key(text).replace("-", " "))
    found = []
    for token, after in zip(tokens, [*tokens[1:], ""], strict=False):
        if not token[-1].isdigit():
            continue
        plain = token.replace(",", "") if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", token) else token
        try:
            value = float(plain.replace(",", ".")) * _MULTIPLES.get(after, 1)
        except ValueError:
            found.append(Number(plain))
            continue
        unit = after if after in _UNITS else after.removesuffix("s")
        dimension, factor = _UNITS.get(unit, ("", 1.0))
        found.append(Number(value, dimension, unit if dimension else "", factor))
    return tuple(found)


def _spells_numbers(text: str) -> bool:
    """Say whether a text holds a number in words."""
    words = set(re.findall(r"[^\W\d_]+", trivial_key(text)))
    return bool(words & ({*_SMALL} - {"one"} | {*_TENS} | {*_MULTIPLES} - {"k"} | _OTHER_NUMBERS))


def _same_number(one: Number, other: Number) -> bool:
    """Compare two numbers by value, or converted: then nearly, for a month is about four weeks."""
    if isinstance(one.value, str) or isinstance(other.value, str) or one.unit == other.unit:
        return one.value == other.value
    if one.dimension != other.dimension:
        # "14 year old" and "age 14": one of the two has no unit.
        return one.value == other.value and not (one.unit and other.unit)
    first, second = one.value * one.factor, other.value * other.factor
    return abs(first - second) <= _UNIT_SLACK * abs(first)


def changed_number(query: str, text: str) -> bool:
    """Say whether two texts hold different numbers.

    Parameters
    ----------
    query, text : str
        The query, and what should say the same.

    Returns
    -------
    bool
        True if a number in digits stands in one of them alone, in whatever unit, and the other spells none out.
    """
    before, after = numbers_of(query), numbers_of(text)
    lost = not _spells_numbers(text) and any(not _holds(after, number) for number in before)
    return lost or (not _spells_numbers(query) and any(not _holds(before, number) for number in after))


def _holds(numbers: tuple[Number, ...], wanted: Number) -> bool:
    """Say whether a number is among others."""
    return any(_same_number(wanted, number) for number in numbers)


def changed_negation(query: str, text: str) -> bool:
    """Say whether just one of two texts negates.

    Parameters
    ----------
    query, text : str
        The query, and what should say the same.

    Returns
    -------
    bool
        True if so. "or not" negates nothing.
    """
    one, other = (re.sub(r"\bor not\b", "", words, flags=re.IGNORECASE) for words in (query, text))
    return bool(_NEGATION.search(one)) != bool(_NEGATION.search(other))


def names_of(text: str) -> set[str]:
    """Return what looks like a name that has one spelling: an identifier, a version, an abbreviation.

    Parameters
    ----------
    text : str
        A text.

    Returns
    -------
    set of str
        In lower case.
    """
    return {name.casefold().rstrip("(") for name in _NAME.findall(text)}


def changed_name(query: str, text: str) -> bool:
    """Say whether a text has another name in the place of the query's.

    Parameters
    ----------
    query, text : str
        The query, and what should say the same.

    Returns
    -------
    bool
        True if a name is lost and another one is new that is no abbreviation of the query's words.
    """
    before, after = query.casefold(), text.casefold()
    lost = [name for name in names_of(query) if name not in after]
    new = [name for name in names_of(text) if name not in before and not _abbreviates(name, before)]
    return bool(lost and new)


def shared_words(query: str, text: str) -> float:
    """Return how many of the content words of two texts are in both.

    Parameters
    ----------
    query, text : str
        Two texts.

    Returns
    -------
    float
        The Jaccard similarity of their content words, numbers aside, in [0, 1].
    """
    one, other = ({word for word in words_of(words) if not word[0].isdigit()} for words in (query, text))
    return len(one & other) / len(one | other) if one | other else 1.0


def _abbreviates(name: str, text: str) -> bool:
    """Say whether a name's letters begin words of a text, in their order."""
    initials = iter(word[0] for word in re.findall(r"\w+", text))
    return all(letter in initials for letter in re.sub(r"[^\w]", "", name).removesuffix("s"))


def differs(query: str, text: str, equivalents: tuple[str, ...] = ()) -> bool:
    """Say whether the words of a negative show a difference from the query that an answer would feel.

    Parameters
    ----------
    query, text : str
        The query and its negative.
    equivalents : tuple of str
        Paraphrases of the query: words that they bring are no difference.

    Returns
    -------
    bool
        True if a negation, a number, a sign, a content word, the question, or the order around a preposition differs,
        or two words are exchanged.
    """
    if changed_negation(query, text) or _values(query) != _values(text) or _signs(query) != _signs(text):
        return True
    if {*trivial_key(query).split()} & _TELLING != {*trivial_key(text).split()} & _TELLING:
        return True
    if _questions(query) and _questions(text) and not _questions(query) & _questions(text):
        return True
    before, after = words_of(query), words_of(text)
    if before != after:
        known = before.union(*(words_of(equivalent) for equivalent in equivalents))
        # Words left out alone may leave the same question in fewer words.
        return bool(after - known) or bool(before - after and not equivalents)
    return _sides(query) != _sides(text) or _exchanged(query, text)


def _questions(text: str) -> set[str]:
    """Return which questions a text asks, as far as that is plain."""
    return {" ".join(found.lower().split()) for found in _QUESTION.findall(text)}


def _exchanged(query: str, text: str) -> bool:
    """Say whether two content words stand in each other's place, and all others where they were."""
    one, other = (
        [stem for word in trivial_key(words).split() for stem in sorted(words_of(word))] for words in (query, text)
    )
    if len(one) != len(other) or len(one) < _LEAST_TO_EXCHANGE or _CHOICE.search(query):
        return False
    places = [place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
    return len(places) == 2 and one[places[0]] == other[places[1]] and one[places[1]] == other[places[0]]


def _values(text: str) -> list[float | str]:
    """Return the numbers of a text as they stand."""
    return [number.value for number in numbers_of(text)]


def _signs(text: str) -> set[str]:
    """Return the operators of a text: words of signs alone, and the signs of numbers."""
    return set(re.findall(r"(?<!\S)[^\w\s,;.:?!&\"'()–—-]+(?!\S)|(?<!\S)[+-](?=\d)", text))  # noqa: RUF001


def _sides(text: str) -> list[frozenset[str]]:
    """Return the content words between the prepositions that give a direction, in order."""
    sides: list[list[str]] = [[]]
    for word in trivial_key(text).split():
        if word in _DIRECTION:
            sides.append([])
        else:
            sides[-1].append(word)
    return [side for words in sides if (side := words_of(" ".join(words)))]
