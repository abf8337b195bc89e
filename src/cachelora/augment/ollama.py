"""Engine `ollama`: an Ollama server, by its own protocol."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Any

from cachelora.augment.journal import identity_of
from cachelora.augment.prompt import Prompts, query_seed
from cachelora.augment.server import (
    CONNECT_SECONDS,
    PASSING_STATUSES,
    QUERY_STATUSES,
    Answer,
    LostQueryError,
    NoReplyError,
    Server,
    token_count,
)
from cachelora.config import OllamaEngine
from cachelora.errors import EngineError

_log = logging.getLogger(__name__)


class Ollama(Server):
    """An Ollama server.

    Parameters
    ----------
    settings : OllamaEngine
        The server, the model, and how it is asked.
    prompts : Prompts
        What is asked.
    seed : int
        Seed of the LLM's sampling.
    """

    type = "ollama"
    packages = ("ollama", "tenacity")

    def __init__(self, settings: OllamaEngine, prompts: Prompts, seed: int) -> None:
        # Which hosted models want.
        super().__init__(settings, prompts, seed, "OLLAMA_API_KEY")
        self._digest: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the replies: the journal's key. The server is asked for the model's digest."""
        if self._digest is None:
            self.start()
        decisive = {"max_tokens", "temperature", "context_tokens", "think"}
        return identity_of(
            self.type, [self.model, self._digest], self.prompt_version, self._seed, self._settings, decisive
        )

    def _client(self) -> AbstractAsyncContextManager[Any]:
        """Make a client."""
        import httpx
        import ollama

        return ollama.AsyncClient(
            host=self._settings.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            # Else requests above its limit wait for a connection, and their time is running.
            limits=httpx.Limits(max_connections=None),
        )

    async def _check(self) -> None:
        """Find the model and its digest."""
        import httpx

        try:
            async with self._client() as client:
                model = self._found(await asyncio.wait_for(client.list(), CONNECT_SECONDS))
                self._digest = (model or await self._pull(client)).digest
        except (ConnectionError, httpx.TransportError, TimeoutError) as error:
            raise self._error(
                f"no server answers there ({self._said(error)})", "Start it by `ollama serve`, or correct `url`"
            ) from error
        except EngineError:
            raise
        except Exception as error:
            # Of many kinds: the client takes what it is given for what it should be.
            raise self._given_up(error) from error

    def _found(self, listed: Any) -> Any:
        """Find the model in the server's list; a name without a tag means the tag `latest`."""
        name = self.model if ":" in self.model.rpartition("/")[2] else f"{self.model}:latest"
        return next((model for model in listed.models if model.model in (self.model, name)), None)

    async def _pull(self, client: Any) -> Any:
        """Have the server pull the model, if the config says so, and return what it lists then."""
        if not self._settings.pull:
            raise self._error(
                f"it does not have the model {self.model}",
                f"Pull it with: ollama pull {self.model}   (or set the engine's `pull: true`)",
            )
        said = None
        async for part in await client.pull(self.model, stream=True):
            share = f" {100 * (part.completed or 0) // part.total} %" if part.total else ""
            if (now := f"{part.status}{share}") != said:
                _log.info("pulling %s: %s", self.model, now)
                said = now
        model = self._found(await client.list())
        if model is None:
            raise self._error(f"it pulled {self.model} and does not list it", "See the server's log")
        return model

    def _may_pass(self, error: BaseException) -> bool:
        """Say whether another attempt may help."""
        import httpx
        import ollama

        if isinstance(error, ollama.ResponseError):
            return error.status_code in PASSING_STATUSES or error.status_code >= 500
        return isinstance(error, ConnectionError | httpx.TransportError)

    def _given_up(self, error: BaseException) -> EngineError:
        """Say what is wrong with the server, after the last attempt."""
        import httpx
        import ollama

        if isinstance(error, ConnectionError | httpx.TransportError):
            return self._stopped_answering(error)
        if not isinstance(error, ollama.ResponseError):
            return self._error(f"its answers are not of Ollama's protocol ({self._said(error)})", "Correct `url`")
        if self._may_pass(error):
            return self._stopped_answering(error)
        remedy = {
            401: "Set the environment variable OLLAMA_API_KEY to a valid key",
            404: f"Pull the model with: ollama pull {self.model}   (or correct `url` and `model`)",
        }.get(error.status_code, "Correct the engine's settings")
        return self._error(f"it refuses with {error.status_code} ({self._said(error)})", remedy)

    async def _complete(self, client: Any, task: str, query_id: str, query: str) -> Answer:
        """Send one request."""
        import httpx
        import ollama

        try:
            answer = await client.chat(
                model=self.model,
                messages=self._prompts.messages(task, query),
                format=self._prompts.schema(task),
                think=self._settings.think,
                keep_alive=self._settings.keep_alive,
                options={
                    "num_ctx": self._settings.context_tokens,
                    "num_predict": self._settings.max_tokens,
                    "temperature": self._settings.temperature,
                    "seed": query_seed(self._seed, query_id),
                },
            )
        except ollama.ResponseError as error:
            if error.status_code not in QUERY_STATUSES:
                raise
            # The query itself: the server has the model, and takes the other queries.
            raise LostQueryError("the server refused the query", str(error)) from error
        except (httpx.DecodingError, httpx.TooManyRedirects, ValueError, TypeError, AttributeError) as error:
            raise NoReplyError(f"an answer that is not of the protocol: {error}") from error
        tokens = token_count(answer.prompt_eval_count), token_count(answer.eval_count)
        if answer.message.content:
            return Answer(answer.message.content, *tokens)
        if answer.done_reason == "length":
            raise LostQueryError("max_tokens ended before the reply began", str(answer), *tokens)
        raise NoReplyError(f"an empty reply: {self._said(answer)}")
