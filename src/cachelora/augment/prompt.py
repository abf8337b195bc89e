"""The prompts and reply schemas that live engines send, and the version that names them."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar

from cachelora.schemas import LOOK_ALIKE_KINDS

TASKS = ("paraphrases", "negatives")
"""What augmentation asks for, each in a call of its own."""

_KINDS = {
    "aspect": "the same subject, but another question about it",
    "entity": "the same question about another subject of the same sort",
    "polarity": "the opposite: negated, reversed, an antonym",
    "quantity": "another number, dose, version, date or age (put one in if there is none)",
    "scope": "a condition added, removed or changed, so that the answer changes",
}


class Prompts(ABC):
    """What an engine is asked about each of many things, and the form of its replies.

    Attributes
    ----------
    tasks : tuple of str
        The calls that are made for each; a reply is a JSON object with the task as its key.
    """

    tasks: ClassVar[tuple[str, ...]]

    @abstractmethod
    def messages(self, task: str, asked: str) -> list[dict[str, str]]:
        """Return the chat messages (role and content) of one task about one thing, which is data."""

    @abstractmethod
    def schema(self, task: str) -> dict[str, Any]:
        """Return the JSON schema of the reply to one task."""

    def response_format(self, task: str) -> dict[str, Any]:
        """Return what holds a server of the OpenAI protocol to the schema of one task.

        Parameters
        ----------
        task : str
            One of the tasks.

        Returns
        -------
        dict
            The request's ``response_format``.
        """
        return {"type": "json_schema", "json_schema": {"name": task, "schema": self.schema(task)}}

    @property
    def version(self) -> str:
        """Digest of everything that is sent beside what is asked about."""
        sent = [[self.messages(task, "{query}"), self.schema(task)] for task in self.tasks]
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class AugmentPrompts(Prompts):
    """The prompts for the paraphrases and negatives of a domain's queries.

    Parameters
    ----------
    domain : dict
        Its words: ``field``, and the keys of :class:`cachelora.config.DomainPrompt`.
    paraphrases, negatives : int
        How many are asked for.
    max_chars : int
        Longest text that the schema allows.
    """

    domain: dict[str, Any]
    paraphrases: int
    negatives: int
    max_chars: int
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def messages(self, task: str, asked: str) -> list[dict[str, str]]:
        """Return the chat messages that ask for one task.

        Parameters
        ----------
        task : str
            One of :data:`TASKS`.
        asked : str
            The query. It is data: delimited, and stripped of the delimiters.

        Returns
        -------
        list of dict
            Role and content of each message: the system's, a question and its answer for each example, the question.
        """
        messages = [{"role": "system", "content": filled("system", prompt_words(self.domain))}]
        for example in self.domain.get("examples", []):
            shown = json.dumps({task: example[task][: getattr(self, task)]}, ensure_ascii=False)
            messages += [
                {"role": "user", "content": self._question(task, example["query"])},
                {"role": "assistant", "content": shown},
            ]
        return [*messages, {"role": "user", "content": self._question(task, asked)}]

    def schema(self, task: str) -> dict[str, Any]:
        """Return the JSON schema of the reply to one task.

        Parameters
        ----------
        task : str
            One of :data:`TASKS`.

        Returns
        -------
        dict
            The schema.
        """
        text = {"type": "string", "minLength": 1, "maxLength": self.max_chars}
        negative = {
            "type": "object",
            "properties": {"kind": {"enum": list(LOOK_ALIKE_KINDS)}, "text": text},
            "required": ["kind", "text"],
            "additionalProperties": False,
        }
        number = getattr(self, task)
        items = {"paraphrases": text, "negatives": negative}[task]
        return {
            "type": "object",
            "properties": {task: {"type": "array", "items": items, "minItems": number, "maxItems": number}},
            "required": [task],
            "additionalProperties": False,
        }

    def _question(self, task: str, query: str) -> str:
        """Ask for one task."""
        words = {
            "number": str(getattr(self, task)),
            "query": bare(query, "query"),
            "kinds": "\n".join(f'- "{kind}": {meaning}' for kind, meaning in _KINDS.items()),
        }
        return filled(task, prompt_words(self.domain) | words)


def prompt_words(domain: dict[str, Any]) -> dict[str, str]:
    """Return what the templates say of a domain.

    Parameters
    ----------
    domain : dict
        ``field``, and the keys of :class:`cachelora.config.DomainPrompt`.

    Returns
    -------
    dict of str to str
        By the name in the templates.
    """
    field, role = domain["field"], domain.get("role")
    subfields, aspects = (", ".join(domain.get(key, [])) for key in ("subfields", "aspects"))
    return {
        "field": field,
        "role": role or f"an expert in the field of {field}",
        "subfields": f" ({subfields})" if subfields else "",
        "aspects": f"Other aspects in this field are for example {aspects}. " if aspects else "",
    }


def bare(text: str, *tags: str) -> str:
    """Return a text without the tags that delimit it in a prompt.

    Parameters
    ----------
    text : str
        Data.
    *tags : str
        Names of tags.

    Returns
    -------
    str
        The text, with a blank for each tag.
    """
    for tag in tags:
        text = text.replace(f"<{tag}>", " ").replace(f"</{tag}>", " ")
    return text


def query_seed(seed: int, query_id: str) -> int:
    """Return a seed of its own for each query, so that their order does not matter.

    Parameters
    ----------
    seed : int
        The run's seed.
    query_id : str
        The query's digest.

    Returns
    -------
    int
        In [0, 2**31).
    """
    return (seed + int(query_id[:8], 16)) % 2**31


def filled(name: str, words: dict[str, str], package: str = "cachelora.augment") -> str:
    """Fill in a template that ships with the package.

    Parameters
    ----------
    name : str
        Its name.
    words : dict of str to str
        What it names.
    package : str
        Beside which modules it lies.

    Returns
    -------
    str
        The prompt.
    """
    template = files(package).joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8").strip()
    return template.format_map(words)
