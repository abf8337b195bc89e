"""Negatives that rules make of a query where English allows it safely: one word is exchanged, the rest stays."""

import hashlib
import re
from collections.abc import Iterator

# Pairs of which each is the other's opposite in nearly every sentence that a user types. Words that have a second
# common meaning ("right", "light", "open", "last", "over") are not in it.
_ANTONYMS = (
    ("enable", "disable"), ("enabled", "disabled"), ("enabling", "disabling"), ("increase", "decrease"),
    ("increases", "decreases"), ("increasing", "decreasing"),
    ("install", "uninstall"), ("installing", "uninstalling"), ("encrypt", "decrypt"), ("encrypting", "decrypting"),
    ("encode", "decode"), ("encoding", "decoding"), ("serialize", "deserialize"), ("compress", "decompress"),
    ("subscribe", "unsubscribe"), ("upload", "download"), ("mounting", "unmounting"), ("locking", "unlocking"),
    ("ascending", "descending"), ("maximum", "minimum"), ("minimise", "maximise"), ("minimize", "maximize"),
    ("gaining", "losing"), ("legal", "illegal"),
    ("lawful", "unlawful"), ("allowed", "forbidden"), ("oldest", "newest"), ("smallest", "largest"),
    ("shortest", "longest"), ("fastest", "slowest"), ("lowest", "highest"), ("cheapest", "most expensive"),
    ("buyer", "seller"), ("tenant", "landlord"), ("employer", "employee"), ("plaintiff", "defendant"),
    ("lender", "borrower"), ("synchronous", "asynchronous"), ("inhale", "exhale"),
    ("agonist", "antagonist"), ("hyperthyroidism", "hypothyroidism"), ("hyperglycemia", "hypoglycemia"),
    ("hypertension", "hypotension"), ("introvert", "extrovert"), ("introverts", "extroverts"),
    ("deductible", "non-deductible"), ("voluntary", "involuntary"),
)  # fmt: skip
# "With" turned into "without" seldom makes a question that is asked.
_OPPOSITE = {one: other for pair in _ANTONYMS for one, other in (pair, pair[::-1])} | {"without": "with"}
_WORD = re.compile(
    r"(?<![\w.-])(?:" + "|".join(sorted(map(re.escape, _OPPOSITE), key=len, reverse=True)) + r")(?![\w-])",
    re.IGNORECASE,
)
# A whole number before what it counts or measures; not a part of a name, a code, a version, a date, a price with cents.
_NUMBER = re.compile(
    r"(?<![\w.,:/#+(-])(\d{1,4})(?=%|[ -]?(?:mg|mcg|g|kg|ml|cm|mm|km|gb|mb|kb|h|hours?|minutes?|mins?|seconds?|days?"
    r"|weeks?|months?|years?|percent|euros?|dollars?|pounds?|people|persons|employees|children|times|tablets|rows|columns)\b)",
    re.IGNORECASE,
)
_VERSION = re.compile(r"(?<=[a-z] )(\d{1,2})\.(\d{1,2})(?![\w.])", re.IGNORECASE)
# Single words on both sides of a direction; those of time do not turn around.
_SWAPS = re.compile(
    r"\b(?P<verb>from|convert|converting|migrate from|translate|cast|parse)\s+(?P<one>[\w#+.-]+)\s+(?P<word>to|into)\s+"
    r"(?P<other>[\w#+.-]+)(?=\s|$|[?!,;)])",
    re.IGNORECASE,
)
_NO_ENDS = frozenset((
    "a", "an", "the", "my", "our", "your", "this", "that", "it", "them", "time", "work", "home", "day", "start", "end",
    "here", "there", "one", "now", "today", "first", "scratch", "bed", "sleep",
))  # fmt: skip
_NEGATION = re.compile(r"(?<!or) not\b(?! only)|(?<!\bai)(?<!\bsha)n['’]t\b|\bcannot\b", re.IGNORECASE)  # noqa: RUF001
_IRREGULAR = re.compile(r"\b(?:can|won)['’]t\b|\bcannot\b", re.IGNORECASE)  # noqa: RUF001
_OPEN = re.compile(r"\s*(?:why|what|which|when|who|how)\b", re.IGNORECASE)


def rule_made_negatives(query: str) -> list[tuple[str, str]]:
    """Make hard negatives of a query by rules.

    Parameters
    ----------
    query : str
        An English query.

    Returns
    -------
    list of (str, str)
        Kind and text of each: an opposite word, a negation left out of an open question, another number or version,
        a direction turned around. Empty where no rule is safe; the same for the same query.
    """
    made = [*_opposites(query), *_negations(query), *_numbers(query), *_directions(query)]
    return [(kind, text) for kind, text in dict.fromkeys(made) if text.casefold() != query.casefold()]


def _opposites(query: str) -> Iterator[tuple[str, str]]:
    """Exchange the one word that has an opposite; with two of them, the sense is not sure."""
    found = _WORD.findall(query)
    # Letters that a search without case takes for others, such as the Turkish i, are in no list.
    if len(found) == 1 and (opposite := _OPPOSITE.get(found[0].lower())):
        yield "polarity", _WORD.sub(_cased(opposite, found[0]), query)


def _negations(query: str) -> Iterator[tuple[str, str]]:
    """Leave out the one negation of an open question; of a yes-no question, the same answer may serve both."""
    if _OPEN.match(query) and len(_NEGATION.findall(query)) == 1:
        whole = _IRREGULAR.sub(lambda match: _cased({"c": "can", "w": "will"}[match[0][0].lower()], match[0]), query)
        yield "polarity", _NEGATION.sub("", whole)


def _numbers(query: str) -> Iterator[tuple[str, str]]:
    """Exchange one number for another of its size, or one version for the next but one."""
    numbers = [*_NUMBER.finditer(query)]
    if len(numbers) == 1:
        (match,) = numbers
        yield "quantity", query[: match.start(1)] + _other_number(int(match[1]), query) + query[match.end(1) :]
    versions = [*_VERSION.finditer(query)]
    if len(versions) == 1 and not numbers:
        (match,) = versions
        minor = int(match[2])
        changed = f"{match[1]}.{minor + 2 if minor < 8 else minor - 2}"
        yield "quantity", query[: match.start()] + changed + query[match.end() :]


def _other_number(number: int, query: str) -> str:
    """Choose another number: a year near by, else about half or twice as much, by a hash of the query."""
    up = hashlib.sha256(query.encode()).digest()[0] % 2 == 0
    if 1900 <= number <= 2100:
        return str(number + 3 if up and number < 2020 else number - 3)
    if number < 2:
        return str(number + 1)
    if number < 5:
        return str(number + 1 if up or number == 2 else number - 1)
    return str(number * 2 if up else number // 2)


def _directions(query: str) -> Iterator[tuple[str, str]]:
    """Turn a direction around."""
    found = [*_SWAPS.finditer(query)]
    if len(found) != 1:
        return
    (match,) = found
    ends = match["one"].lower(), match["other"].lower()
    if _NO_ENDS & {*ends} or any(end[0].isdigit() for end in ends) or ends[0] == ends[1]:
        return
    turned = f"{match['verb']} {match['other']} {match['word']} {match['one']}"
    yield "polarity", query[: match.start()] + turned + query[match.end() :]


def _cased(word: str, like: str) -> str:
    """Return a word in the case of another."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word
