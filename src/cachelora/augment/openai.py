"""Engine `openai`: any server with an OpenAI-compatible address, a hosted one or one's own."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from typing import Any

from cachelora.augment.prompt import TASKS, Prompts, query_seed
from cachelora.augment.reply import RawReply, parse_task
from cachelora.config import Augment, OpenAIEngine
from cachelora.errors import EngineError

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_LONGEST_WAIT_SECONDS = 60.0
# From the strictest to what every server takes.
_FORMATS = ("json_schema", "json_object", "text")


class OpenAI:
    """A server that speaks the OpenAI protocol.

    Parameters
    ----------
    settings : OpenAIEngine
        The server, the model, and how it is asked.
    augment : Augment
        How much is asked for.
    field : str
        What the prompts call the domain.
    seed : int
        Seed of the LLM's sampling, for servers that take one.

    Raises
    ------
    EngineError
        If the package openai is not installed, or the server does not answer or refuses the key.
    """

    type = "openai"

    def __init__(self, settings: OpenAIEngine, augment: Augment, field: str, seed: int) -> None:
        try:
            import openai
            import tenacity  # noqa: F401
        except ImportError as error:
            raise EngineError(
                "engine openai",
                f"the package {error.name} is not installed here",
                "Install it with: .venv/bin/pip install -r requirements/openai.txt",
            ) from error
        self._settings = settings
        self._seed = seed
        self._key = os.environ.get(settings.key_variable, "")
        self._prompts = Prompts(field, augment.paraphrases, augment.negatives, augment.max_chars)
        self._format = 0
        self.model = settings.model
        self.prompt_version = self._prompts.version
        self._tokens = 0
        # Its own retries would not show in the log, and its own timeout lets a reply that trickles in go on for ever.
        self._new_client = lambda: openai.AsyncOpenAI(
            base_url=settings.url, api_key=self._key or "none", max_retries=0, timeout=None
        )
        asyncio.run(self._check())

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the replies: the journal's key."""
        decisive = self._settings.model_dump(include={"max_tokens", "temperature"})
        return {
            "type": self.type,
            "model": self.model,
            "prompt": self.prompt_version,
            "seed": self._seed,
            **decisive,
        }

    def replies(self, queries: Sequence[tuple[str, str]]) -> Iterator[RawReply]:
        """Ask for the replies to some queries, several at once.

        Parameters
        ----------
        queries : sequence of (str, str)
            Digest and text of each query.

        Yields
        ------
        RawReply
            One for each query, in the order in which they are finished. One that the server did not finish in time,
            as often as it was asked, has a ``failure``.

        Raises
        ------
        EngineError
            If the server stops answering, or refuses to; after the replies that were on their way.
        """
        started = time.monotonic()
        with asyncio.Runner() as runner:
            replies = self._replies(queries)

            async def following() -> RawReply | None:
                return await anext(replies, None)

            while (reply := runner.run(following())) is not None:
                yield reply
        rate = self._tokens / (time.monotonic() - started)
        _log.info("%d tokens written, %.0f a second", self._tokens, rate)

    async def _replies(self, queries: Sequence[tuple[str, str]]) -> AsyncIterator[RawReply]:
        """Keep so many requests in flight as the settings say."""
        waiting = iter(queries)
        stopped: EngineError | None = None
        async with self._new_client() as client:
            flying = {
                asyncio.create_task(self._ask(client, *query)) for query in islice(waiting, self._settings.concurrency)
            }
            try:
                while flying:
                    done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if isinstance(error := task.exception(), EngineError):
                            stopped = stopped or error
                        elif error:
                            raise error
                        else:
                            yield task.result()
                    if not stopped:
                        flying |= {
                            asyncio.create_task(self._ask(client, *query)) for query in islice(waiting, len(done))
                        }
            finally:
                for task in flying:
                    task.cancel()
        if stopped:
            raise stopped

    async def _check(self) -> None:
        """Ask the server for its models, so that one that is down or refuses the key is known in seconds."""
        import openai

        try:
            async with self._new_client() as client:
                models = await asyncio.wait_for(client.models.list(), _CONNECT_SECONDS)
        except (openai.APIConnectionError, TimeoutError) as error:
            raise self._error(f"no server answers there ({self._said(error)})", "Start it, or correct `url`") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refusal(error) from error
        except openai.OpenAIError as error:
            # Not every server has the list; what it lacks will show.
            _log.info("%s gives no list of models: %s", self._settings.url, self._said(error))
            return
        known = [model.id for model in models.data]
        if known and self.model not in known:
            _log.warning("%s does not list the model %s, but %s", self._settings.url, self.model, ", ".join(known[:9]))

    async def _ask(self, client: Any, query_id: str, query: str) -> RawReply:
        """Ask for everything about one query."""
        replied: dict[str, Any] = {}
        for task in TASKS:
            try:
                text = await self._insist(client, task, query_id, query)
            except TimeoutError:
                failure = f"no whole reply within {self._settings.timeout:g} s"
                _log.warning("query %s: %s, %d times", query_id, failure, self._settings.attempts)
                return RawReply(query_id, None, self.model, self.prompt_version, failure)
            replied[task] = parse_task(text, task)
        return RawReply(query_id, replied, self.model, self.prompt_version)

    async def _insist(self, client: Any, task: str, query_id: str, query: str) -> str:
        """Ask for one task, again and again where that may help."""
        import openai
        import tenacity

        def may_pass(error: BaseException) -> bool:
            if isinstance(error, openai.RateLimitError):
                return error.code != "insufficient_quota"
            passing = (openai.APIConnectionError, openai.InternalServerError, openai.APIResponseValidationError)
            return isinstance(error, (*passing, json.JSONDecodeError, TimeoutError))

        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(may_pass),
                wait=_wait,
                stop=tenacity.stop_after_attempt(self._settings.attempts),
                before_sleep=lambda state: _log.info(
                    "query %s: %s; again in %.1f s",
                    query_id, self._said(state.outcome.exception()), state.next_action.sleep,
                ),
                reraise=True,
            ):  # fmt: skip
                with attempt:
                    return await self._complete(client, task, query_id, query)
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise self._error(
                f"it stopped answering ({self._said(error)}), {self._settings.attempts} times",
                "What it has answered is kept: run again when it is back",
            ) from error
        except (openai.APIResponseValidationError, json.JSONDecodeError) as error:
            raise self._error(
                f"its answers are not of the protocol ({self._said(error)})", "Correct `url`: most end in /v1"
            ) from error
        except openai.APIStatusError as error:
            raise self._refusal(error) from error
        raise AssertionError("tenacity ends by a return or an exception")

    async def _complete(self, client: Any, task: str, query_id: str, query: str) -> str:
        """Send one request, in the strictest format that the server takes."""
        import openai

        for format_, name in enumerate(_FORMATS[self._format :], start=self._format):
            try:
                async with asyncio.timeout(self._settings.timeout):
                    answer = await client.chat.completions.create(**self._request(task, query_id, query, name))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                # Either the format, which the next one shows, or the query itself.
                refused = error
                continue
            if format_ > self._format:
                self._format = format_
                _log.warning(
                    "%s refuses the format %s (%s): asking with %s from here on",
                    self._settings.url, _FORMATS[format_ - 1], self._said(refused), name,
                )  # fmt: skip
            if answer.usage is not None:
                self._tokens += answer.usage.completion_tokens or 0
            return (answer.choices[0].message.content or "") if answer.choices else ""
        _log.warning("query %s: refused: %s", query_id, self._said(refused))
        return ""

    def _request(self, task: str, query_id: str, query: str, format_: str) -> dict[str, Any]:
        """Make the arguments of a request."""
        messages = self._prompts.messages(task, query)
        request: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self._settings.max_tokens,
            "temperature": self._settings.temperature,
            "seed": query_seed(self._seed, query_id),
        }
        if format_ == "json_schema":
            request["response_format"] = self._prompts.response_format(task)
        else:
            schema = self._prompts.schema(task)
            told = f"{messages[-1]['content']}\n\nReply with JSON alone, of this JSON schema:\n{json.dumps(schema)}"
            messages = [*messages[:-1], messages[-1] | {"content": told}]
            if format_ == "json_object":
                request["response_format"] = {"type": format_}
        return request | {"messages": messages}

    def _refusal(self, error: Any) -> EngineError:
        """Say that the server refuses: its own words, and what may help."""
        remedy = {
            401: f"Set the environment variable {self._settings.key_variable} to a valid key",
            403: f"Use a key that may use this model, in {self._settings.key_variable}",
            404: "Correct `url` (most end in /v1) and `model`",
            429: "Pay for more, or wait",
        }.get(error.status_code, "Correct the engine's settings")
        return self._error(f"it refuses with {error.status_code} ({self._said(error)})", remedy)

    def _error(self, what: str, remedy: str) -> EngineError:
        """Make an error that names the server."""
        return EngineError(f"engine openai, {self._settings.url}", what, remedy)

    def _said(self, error: BaseException | None) -> str:
        """Return an error's words on one line, without the key: some servers repeat it."""
        words = " ".join((str(error) or type(error).__name__).split())[:300]
        return words.replace(self._key, "***") if self._key else words


def _wait(state: Any) -> float:
    """Wait as long as the server wants, else twice as long each time, with jitter."""
    import tenacity

    response = getattr(state.outcome.exception(), "response", None)
    wanted = response.headers.get("retry-after", "") if response is not None else ""
    if wanted.replace(".", "", 1).isdigit():
        return min(float(wanted), _LONGEST_WAIT_SECONDS)
    return tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT_SECONDS)(state)
