"""What engines give back: untrusted text, checked one by one."""

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import from_json

from cachelora.schemas import PARAPHRASE, Kind
from cachelora.text import BIDI, normalise, trivial_key

# What LLMs put before or in place of a query: an answer, a refusal, a comment on their own work. None of the texts
# that people wrote for the shipped corpora begins so.
_ANSWER = re.compile(
    r"(?:yes|no|sure|certainly|of course|absolutely|ok|okay)[,.!:]\s"
    r"|(?:here (?:is|are)|here's|note:|note that|answer:|the answer|as an ai|i am an ai|i'm an ai|i'm sorry,? but"
    r"|i am sorry,? but|i cannot|i can't (?:help|assist|answer|provide)|it is (?:important|recommended) to)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RawReply:
    """What an engine gave for one query, unchecked.

    Attributes
    ----------
    query_id : str
        The query.
    replied : Any
        Should be a mapping with ``paraphrases`` (texts) and ``negatives`` (mappings with ``kind`` and ``text``); a
        live engine has under each what the LLM wrote, word for word.
    model : str
        The LLM that wrote it.
    prompt_version : str
        What it was asked with.
    engine : str
        Type of the engine that asked it.
    prompt_tokens, reply_tokens : int
        What it took, in tokens; 0 where that is not known.
    failure : str or None
        Why there is no reply, where another attempt may bring one.
    """

    query_id: str
    replied: Any
    model: str
    prompt_version: str
    engine: str
    prompt_tokens: int = 0
    reply_tokens: int = 0
    failure: str | None = None

    def value(self, task: str) -> Any:
        """Return what was written for a task, as far as it can be read.

        Parameters
        ----------
        task : str
            ``paraphrases`` or ``negatives``.

        Returns
        -------
        Any
            Should be a list; None if there is nothing.
        """
        if not isinstance(self.replied, dict):
            return None
        value = self.replied.get(task)
        if not isinstance(value, str):
            return value
        parsed = parse_json(value)
        return parsed.get(task) if isinstance(parsed, dict) else None


@dataclass(frozen=True)
class Reply:
    """The good texts that were written for one query.

    Attributes
    ----------
    query_id : str
        The query.
    texts : list of (str, str)
        Kind (``paraphrase`` or a kind of negative) and text.
    model : str
        The LLM that wrote them.
    prompt_version : str
        What it was asked with.
    engine : str
        Type of the engine that asked it.
    refused : dict of str to int
        How many texts were refused, by reason.
    """

    query_id: str
    texts: list[tuple[str, str]]
    model: str
    prompt_version: str
    engine: str
    refused: dict[str, int] = field(default_factory=dict)

    def end(self, paraphrases: int, negatives: int) -> str:
        """Say how it went.

        Parameters
        ----------
        paraphrases, negatives : int
            How many were asked for.

        Returns
        -------
        str
            ``complete`` if there are at least so many of both, ``failed`` if the query can make no triplet because it
            has no paraphrase or no negative, else ``partial``.
        """
        written = sum(kind == PARAPHRASE for kind, _ in self.texts)
        others = len(self.texts) - written
        if not written or not others:
            return "failed"
        return "complete" if written >= paraphrases and others >= negatives else "partial"


def _check_text(text: str, info: ValidationInfo) -> str:
    """Refuse what is no query; return it normalised."""
    if len(text) > info.context["max_chars"]:
        raise ValueError("too long")
    if any(unicodedata.category(character) in ("Cc", "Cs") or character in BIDI for character in text.strip()):
        raise ValueError("holds control characters")
    if not any(character.isalnum() for character in text):
        raise ValueError("holds no word")
    if _ANSWER.match(text.strip()):
        raise ValueError("an answer or comment, not a query")
    return normalise(text)


class _Paraphrase(BaseModel):
    """A paraphrase that an LLM wrote."""

    model_config = ConfigDict(strict=True)

    text: Annotated[str, AfterValidator(_check_text)]
    kind: ClassVar[str] = PARAPHRASE


class _Negative(BaseModel):
    """A hard negative that an LLM wrote."""

    model_config = ConfigDict(strict=True)

    text: Annotated[str, AfterValidator(_check_text)]
    kind: Kind


def check_reply(raw: RawReply, query: str, max_chars: int) -> Reply:
    """Keep the good texts of a reply and count the others.

    Parameters
    ----------
    raw : RawReply
        What the engine gave.
    query : str
        The query.
    max_chars : int
        Longer texts are refused.

    Returns
    -------
    Reply
        The texts, normalised, without repetitions.
    """
    texts: list[tuple[str, str]] = []
    refused: Counter[str] = Counter()
    seen = {trivial_key(query)}
    for model, item in [] if raw.failure is not None else _items(raw):
        try:
            written = model.model_validate(item, context={"max_chars": max_chars})
        except ValidationError as error:
            refused[_reason(error)] += 1
            continue
        if trivial_key(written.text) in seen:
            refused["repeats the query or another text"] += 1
            continue
        seen.add(trivial_key(written.text))
        texts.append((written.kind, written.text))
    if raw.failure is not None:
        refused[raw.failure] += 1
    return Reply(raw.query_id, texts, raw.model, raw.prompt_version, raw.engine, dict(refused))


def parse_json(text: str) -> Any:
    """Read the JSON of an LLM's reply, or what is whole of it.

    Parameters
    ----------
    text : str
        What the LLM wrote. Words around the JSON are left out, and its thinking before it; of JSON that was cut, texts
        that were not ended; from a fault in the middle on, everything, the text before the fault too.

    Returns
    -------
    Any
        The value, or None if nothing of it can be read.
    """
    if not text.lstrip().startswith(("{", "`")) and "</think>" in text:
        text = text.partition("</think>")[2]
    start = text.find("{")
    if start < 0 or text.lstrip().startswith("<think>"):
        return None
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[0]
    except json.JSONDecodeError as error:
        end = error.pos
        if end < len(text.rstrip()) and "Unterminated" not in error.msg:
            # Not cut but wrong: a quotation mark inside a text, for example. What stands before it looks like a whole
            # text and is none.
            end = max(start, *(text.rfind(mark, start, end) for mark in ('",', "},"))) + 1
    except (ValueError, RecursionError):
        # Of values: a number with thousands of digits.
        return None
    try:
        return from_json(text[start:end].encode("utf-8", "replace"), allow_partial=True)
    except ValueError:
        return None


def _items(raw: RawReply) -> list[tuple[type[_Paraphrase | _Negative], Any]]:
    """List everything that a reply holds, good or not, with what it should be."""
    paraphrases, negatives = raw.value("paraphrases"), raw.value("negatives")
    texts = [{"text": text} for text in paraphrases] if isinstance(paraphrases, list) else [None]
    return [(_Paraphrase, text) for text in texts] + [
        (_Negative, negative) for negative in (negatives if isinstance(negatives, list) else [None])
    ]


def _reason(error: ValidationError) -> str:
    """Say why a text was refused."""
    problem = error.errors(include_url=False, include_input=False)[0]
    match problem["type"]:
        case "value_error":
            return str(problem["ctx"]["error"])
        case "literal_error":
            return "unknown kind"
    return "not of the form that was asked for"
