"""The prompts and reply schemas that live engines send, and the version that names them."""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from cachelora.schemas import LOOK_ALIKE_KINDS

TASKS = ("paraphrases", "negatives")
"""What is asked for, each in a call of its own."""


@dataclass(frozen=True)
class Prompts:
    """The prompts for a domain.

    Parameters
    ----------
    field : str
        What the domain is called in them.
    paraphrases, negatives : int
        How many are asked for.
    max_chars : int
        Longest text that the schema allows.
    """

    field: str
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
            Role and content of each message.
        """
        number = getattr(self, task)
        bare = query.replace("<query>", " ").replace("</query>", " ")
        return [
            {"role": "system", "content": _template("system").format(field=self.field)},
            {"role": "user", "content": _template(task).format(number=number, query=bare)},
        ]

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


def _template(name: str) -> str:
    """Read a template that ships with the package."""
    return files("cachelora.augment").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8").strip()
