"""The interface of the engines, and the one that the config names."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from cachelora.augment.llamacpp import LlamaCpp
from cachelora.augment.ollama import Ollama
from cachelora.augment.openai import OpenAI
from cachelora.augment.prompt import Prompts
from cachelora.augment.reply import RawReply
from cachelora.augment.vllm import VLLM
from cachelora.config import LiveEngine, LlamaCppEngine, OllamaEngine, VLLMEngine


class Engine(Protocol):
    """What every live engine is.

    Attributes
    ----------
    type : str
        The type that the config names.
    version : str
        Name and version of the package behind it.
    model : str
        The LLM.
    prompt_version : str
        Digest of the prompts.
    identity : dict
        What determines the replies: the journal's key.
    """

    type: str
    version: str
    model: str
    prompt_version: str

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the replies: the journal's key."""

    def start(self) -> None:
        """Load the model, or reach the server: called when there is something to ask."""

    def replies(self, queries: Sequence[tuple[str, str]]) -> Iterator[RawReply]:
        """Ask for the replies to some queries, by digest and text; one for each, in the order of their ends."""


def make_engine(settings: LiveEngine, prompts: Prompts, seed: int, threads: int) -> Engine:
    """Make the engine that the config names.

    Parameters
    ----------
    settings : LiveEngine
        Its settings.
    prompts : Prompts
        What is asked.
    seed : int
        Seed of the LLM's sampling.
    threads : int
        CPU threads, for an LLM that runs on them.

    Returns
    -------
    Engine
        Not started yet.

    Raises
    ------
    EngineError
        If the file or folder of its model is missing, or not the one that the config names.
    """
    if isinstance(settings, LlamaCppEngine):
        return LlamaCpp(settings, prompts, seed, threads)
    return {VLLMEngine: VLLM, OllamaEngine: Ollama}.get(type(settings), OpenAI)(settings, prompts, seed)
