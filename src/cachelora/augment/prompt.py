"""The prompts and reply schemas that live engines send, and the version that names them."""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from cachelora.schemas import LOOK_ALIKE_KINDS

TASKS = ("paraphrases", "negatives")
"""What is asked for, each in a call of its own."""

_KINDS = {
    "aspect": "the same subject, but another question about it",
    "entity": "the same question about another subject of the same sort",
    "polarity": "the opposite: negated, reversed, an antonym",
    "quantity": "another number, dose, version, date or age (put one in if there is none)",
    "scope": "a condition added, removed or changed, so that the answer changes",
}


@dataclass(frozen=True)
class Prompts:
    """The prompts for a domain.

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

    def messages(self, task: str, query: str) -> list[dict[str, str]]:
        """Return the chat messages that ask for one task.

        Parameters
        ----------
        task : str
            One of :data:`TASKS`.
        query : str
            The query. It is data: delimited, and stripped of the delimiters.

        Returns
        -------
        list of dict
            Role and content of each message: the system's, a question and its answer for each example, the question.
        """
        messages = [{"role": "system", "content": _filled("system", self._words())}]
        for example in self.domain.get("examples", []):
            shown = json.dumps({task: example[task][: getattr(self, task)]}, ensure_ascii=False)
            messages += [
                {"role": "user", "content": self._question(task, example["query"])},
                {"role": "assistant", "content": shown},
            ]
        return [*messages, {"role": "user", "content": self._question(task, query)}]

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

    def response_format(self, task: str) -> dict[str, Any]:
        """Return what holds a server of the OpenAI protocol to the schema of one task.

        Parameters
        ----------
        task : str
            One of :data:`TASKS`.

        Returns
        -------
        dict
            The request's ``response_format``.
        """
        return {"type": "json_schema", "json_schema": {"name": task, "schema": self.schema(task)}}

    @property
    def version(self) -> str:
        """Digest of everything that is sent beside the query."""
        sent = [[self.messages(task, "{query}"), self.schema(task)] for task in TASKS]
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()[:12]

    def _question(self, task: str, query: str) -> str:
        """Ask for one task."""
        bare = query.replace("<query>", " ").replace("</query>", " ")
        return _filled(task, self._words() | {"number": str(getattr(self, task)), "query": bare})

    def _words(self) -> dict[str, str]:
        """Return what the templates name."""
        field, role = self.domain["field"], self.domain.get("role")
        subfields, aspects = (", ".join(self.domain.get(key, [])) for key in ("subfields", "aspects"))
        return {
            "field": field,
            "role": role or f"an expert in the field of {field}",
            "subfields": f" ({subfields})" if subfields else "",
            "aspects": f"Other aspects in this field are for example {aspects}. " if aspects else "",
            "kinds": "\n".join(f'- "{kind}": {meaning}' for kind, meaning in _KINDS.items()),
        }


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


def _filled(name: str, words: dict[str, str]) -> str:
    """Fill in a template that ships with the package."""
    template = files("cachelora.augment").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8").strip()
    return template.format_map(words)
