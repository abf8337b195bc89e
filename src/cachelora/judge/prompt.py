"""The prompt by which an LLM judges a pair of queries."""

import json
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from cachelora.augment.prompt import Prompts, bare, filled, prompt_words

SAME_ANSWER = "same_answer"


@dataclass(frozen=True)
class JudgePrompts(Prompts):
    """The prompts that ask whether one answer serves two queries of a domain.

    Parameters
    ----------
    domain : dict
        Its words: ``field``, and the keys of :class:`cachelora.config.DomainPrompt`. Its examples are shown: each
        query beside its paraphrases and its negatives, in turns.
    """

    domain: dict[str, Any]
    tasks: ClassVar[tuple[str, ...]] = (SAME_ANSWER,)

    def messages(self, task: str, asked: str) -> list[dict[str, str]]:
        """Return the chat messages that ask about one pair.

        Parameters
        ----------
        task : str
            The task.
        asked : str
            A pair, as :func:`pair_text` puts it.

        Returns
        -------
        list of dict
            Role and content of each message.
        """
        messages = [{"role": "system", "content": filled("judge", prompt_words(self.domain), "cachelora.judge")}]
        for example in self.domain.get("examples", []):
            negatives = [negative["text"] for negative in example["negatives"]]
            for negative, paraphrase in zip_longest(negatives, example["paraphrases"]):
                for text, same in ((negative, False), (paraphrase, True)):
                    if text is not None:
                        messages += [
                            {"role": "user", "content": self._question(example["query"], text)},
                            {"role": "assistant", "content": json.dumps({SAME_ANSWER: same})},
                        ]
        # What names the version is no pair.
        query, text = json.loads(asked) if asked.startswith("[") else (asked, asked)
        return [*messages, {"role": "user", "content": self._question(query, text)}]

    def schema(self, task: str) -> dict[str, Any]:
        """Return the JSON schema of a verdict.

        Parameters
        ----------
        task : str
            The task.

        Returns
        -------
        dict
            The schema.
        """
        return {
            "type": "object",
            "properties": {task: {"type": "boolean"}},
            "required": [task],
            "additionalProperties": False,
        }

    def _question(self, query: str, text: str) -> str:
        """Ask about one pair."""
        first, second = (bare(words, "first", "second") for words in (query, text))
        return filled(SAME_ANSWER, {"first": first, "second": second}, "cachelora.judge")


def pair_text(query: str, text: str) -> str:
    """Put a pair in one text, as engines take it.

    Parameters
    ----------
    query, text : str
        The query, and what was written for it.

    Returns
    -------
    str
        JSON.
    """
    return json.dumps([query, text], ensure_ascii=False)
