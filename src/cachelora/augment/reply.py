"""What engines give back: untrusted text, checked one by one."""

import json
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from cachelora.schemas import KINDS, PARAPHRASE
from cachelora.text import normalise, trivial_key


@dataclass(frozen=True)
class RawReply:
    """What an engine gave for one query, unchecked.

    Attributes
    ----------
    query_id : str
        The query.
    replied : Any
        Should be a mapping with ``paraphrases`` (texts) and ``negatives`` (mappings with ``kind`` and ``text``).
    model : str
        The LLM that wrote it.
    prompt_version : str
        What it was asked with.
    failure : str or None
        Why there is no reply, where another attempt may bring one.
    """

    query_id: str
    replied: Any
    model: str
    prompt_version: str
    failure: str | None = None


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
    refused : dict of str to int
        How many texts were refused, by reason.
    """

    query_id: str
    texts: list[tuple[str, str]]
    model: str
    prompt_version: str
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the query can make no triplet: it has no paraphrase or no negative."""
        kinds = {kind for kind, _ in self.texts}
        return PARAPHRASE not in kinds or kinds <= {PARAPHRASE}

    def complete(self, paraphrases: int, negatives: int) -> bool:
        """Say whether all that was asked for is there.

        Parameters
        ----------
        paraphrases, negatives : int
            How many were asked for.

        Returns
        -------
        bool
            True if there are at least so many of both.
        """
        written = sum(kind == PARAPHRASE for kind, _ in self.texts)
        return written >= paraphrases and len(self.texts) - written >= negatives


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
    if raw.failure is not None:
        return Reply(raw.query_id, [], raw.model, raw.prompt_version, {raw.failure: 1})
    texts: list[tuple[str, str]] = []
    refused: dict[str, int] = {}
    seen = {trivial_key(query)}
    for kind, text in _items(raw.replied):
        reason = _problem(kind, text, max_chars)
        if reason is None and trivial_key(text) in seen:
            reason = "repeats the query or another text"
        if reason is None:
            seen.add(trivial_key(text))
            texts.append((kind, normalise(text)))
        else:
            refused[reason] = refused.get(reason, 0) + 1
    return Reply(raw.query_id, texts, raw.model, raw.prompt_version, refused)


def parse_json(text: str) -> Any:
    """Read the JSON of an LLM's reply.

    Parameters
    ----------
    text : str
        What the LLM wrote; words around the JSON are left out.

    Returns
    -------
    Any
        The value, or None if there is no JSON, for example because it was cut.
    """
    start = max(text.find("{"), 0)
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def parse_task(text: str, task: str) -> Any:
    """Read what an LLM wrote for one task.

    Parameters
    ----------
    text : str
        Its reply: an object with the task as key.
    task : str
        The key.

    Returns
    -------
    Any
        The value under it, unchecked; None if there is none.
    """
    parsed = parse_json(text)
    return parsed.get(task) if isinstance(parsed, dict) else None


def _items(replied: Any) -> list[tuple[Any, Any]]:
    """List kind and text of everything that a reply holds, good or not."""
    if not isinstance(replied, dict):
        return [(None, None)]
    paraphrases, negatives = replied.get("paraphrases", []), replied.get("negatives", [])
    items: list[tuple[Any, Any]] = []
    items += [(PARAPHRASE, text) for text in paraphrases] if isinstance(paraphrases, list) else [(None, None)]
    for negative in negatives if isinstance(negatives, list) else [None]:
        items.append((negative.get("kind"), negative.get("text")) if isinstance(negative, dict) else (None, None))
    return items


def _problem(kind: Any, text: Any, max_chars: int) -> str | None:
    """Say why a text cannot be used, or None if it can."""
    if not isinstance(text, str) or not isinstance(kind, str):
        return "not of the form that was asked for"
    if kind != PARAPHRASE and kind not in KINDS:
        return "unknown kind"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text.strip()):
        return "holds control characters"
    if not trivial_key(text):
        return "holds no word"
    if len(text) > max_chars:
        return "too long"
    return None
