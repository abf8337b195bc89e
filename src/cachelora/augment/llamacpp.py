"""Engine `llamacpp`: llama.cpp in this process, on any GGUF file, its replies held to a JSON schema."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

from cachelora.augment.journal import identity_of
from cachelora.augment.prompt import Prompts, query_seed
from cachelora.augment.reply import RawReply
from cachelora.config import LlamaCppEngine
from cachelora.errors import EngineError
from cachelora.files import sha256_of
from cachelora.packages import installed_version, package_file, require_packages

_log = logging.getLogger(__name__)


class LlamaCpp:
    """llama.cpp in this process.

    Parameters
    ----------
    settings : LlamaCppEngine
        The GGUF file and how it is run.
    prompts : Prompts
        What is asked.
    seed : int
        Seed of the LLM's sampling.
    threads : int
        CPU threads.

    Raises
    ------
    EngineError
        If the GGUF file is missing, or not the one that the config names.
    """

    type = "llamacpp"

    def __init__(self, settings: LlamaCppEngine, prompts: Prompts, seed: int, threads: int) -> None:
        self.version = installed_version("xllamacpp")
        self._path = path = _gguf_file(settings)
        self.model = path.name
        self.model_sha256 = sha256_of(path)
        if settings.sha256 not in (None, self.model_sha256):
            raise EngineError(
                str(path),
                f"its SHA-256 is {self.model_sha256}, not the config's",
                "Fetch it again, or correct the config",
            )
        self._settings = settings
        self._seed = seed
        self._prompts = prompts
        self.prompt_version = prompts.version
        self._threads = threads
        self._server: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the replies: the journal's key."""
        decisive = {"context_tokens", "max_tokens", "temperature"}
        return identity_of(self.type, self.model_sha256, self.prompt_version, self._seed, self._settings, decisive)

    def start(self) -> None:
        """Load the model.

        Raises
        ------
        EngineError
            If xllamacpp is not installed, or llama.cpp cannot load the file.
        """
        require_packages(self.type, "xllamacpp")
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self._path)
        parameters.n_parallel = self._settings.slots
        parameters.n_ctx = self._settings.context_tokens * self._settings.slots
        parameters.n_gpu_layers = self._settings.gpu_layers
        parameters.cpuparams.n_threads = self._threads
        parameters.verbosity = -1
        parameters.warmup = False
        try:
            self._server = xllamacpp.Server(parameters)
        except Exception as error:
            raise EngineError(
                str(self._path), f"llama.cpp cannot load it ({error})", "Check that it is a whole GGUF file"
            ) from error

    def replies(self, queries: Sequence[tuple[str, str]]) -> Iterator[RawReply]:
        """Ask for the replies to some queries, several at once.

        Parameters
        ----------
        queries : sequence of (str, str)
            Digest and text of each query.

        Yields
        ------
        RawReply
            One for each query, in the order in which they are finished. One that llama.cpp refused, for example
            because it does not fit into the context, has a ``failure``.
        """
        with ThreadPoolExecutor(self._settings.slots) as pool:
            waiting = iter(queries)
            # No more in flight than slots: a kill loses those replies only, and memory does not grow with the log.
            flying = {pool.submit(self._ask, *query) for query in islice(waiting, self._settings.slots)}
            while flying:
                done = next(as_completed(flying))
                flying.remove(done)
                yield done.result()
                flying |= {pool.submit(self._ask, *query) for query in islice(waiting, 1)}

    def _ask(self, query_id: str, query: str) -> RawReply:
        """Ask for everything about one query."""
        replied: dict[str, str] = {}
        prompt_tokens = reply_tokens = 0
        failure = None
        for task in self._prompts.tasks:
            answer = self._server.handle_chat_completions(
                {
                    "messages": self._prompts.messages(task, query),
                    "max_tokens": self._settings.max_tokens,
                    "temperature": self._settings.temperature,
                    "seed": query_seed(self._seed, query_id),
                    "response_format": self._prompts.response_format(task),
                }
            )
            if not answer.get("choices"):
                failure = "llama.cpp refused the query"
                _log.warning("query %s: refused: %s", query_id, str(answer)[:300])
                break
            replied[task] = answer["choices"][0]["message"]["content"] or ""
            prompt_tokens += answer["usage"]["prompt_tokens"]
            reply_tokens += answer["usage"]["completion_tokens"]
        return RawReply(
            query_id, replied, self.model, self.prompt_version, self.type, prompt_tokens, reply_tokens, failure
        )


def _gguf_file(settings: LlamaCppEngine) -> Path:
    """Find the GGUF file that the config names."""
    prefix, _, name = settings.model.partition(":")
    path = package_file(name, "*.gguf") if prefix == "package" else Path(settings.model)
    if not path.is_file():
        raise EngineError(f"engines: model '{settings.model}'", "no such file", "Correct the path of the GGUF file")
    return path
