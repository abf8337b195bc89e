"""Engine `openai`: any server with an OpenAI-compatible address, a hosted one or one's own."""

import asyncio
import json
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
from cachelora.config import OpenAIEngine
from cachelora.errors import EngineError

_log = logging.getLogger(__name__)

# From the strictest to what every server takes.
_FORMATS = ("json_schema", "json_object", "text")


class OpenAI(Server):
    """A server that speaks the OpenAI protocol.

    Parameters
    ----------
    settings : OpenAIEngine
        The server, the model, and how it is asked.
    prompts : Prompts
        What is asked.
    seed : int
        Seed of the LLM's sampling, for servers that take one.
    """

    type = "openai"
    packages = ("openai", "tenacity")

    def __init__(self, settings: OpenAIEngine, prompts: Prompts, seed: int) -> None:
        super().__init__(settings, prompts, seed, settings.key_variable)
        self._format = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the replies: the journal's key."""
        decisive = {"max_tokens", "temperature", "request"}
        return identity_of(self.type, self.model, self.prompt_version, self._seed, self._settings, decisive)

    def _client(self) -> AbstractAsyncContextManager[Any]:
        """Make a client that neither waits nor tries again by itself: what it does would not show in the log."""
        import httpx2
        import openai

        return openai.AsyncOpenAI(
            base_url=self._settings.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=None,
            # Else requests above its limit wait for a connection, and their time is running.
            http_client=openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_connections=None)),
        )

    async def _check(self) -> None:
        """Ask the server for its models."""
        import openai

        try:
            async with self._client() as client:
                models = await asyncio.wait_for(client.models.list(), CONNECT_SECONDS)
                known = [model.id for model in models.data]
                listed = ", ".join(known[:9])
        except (openai.APIConnectionError, TimeoutError) as error:
            raise self._error(f"no server answers there ({self._said(error)})", "Start it, or correct `url`") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refusal(error) from error
        except openai.OpenAIError as error:
            # Not every server has the list; what it lacks will show.
            _log.info("%s gives no list of models: %s", self._settings.url, self._said(error))
            return
        except Exception as error:
            # Of many kinds: the client takes what it is given for what it should be.
            raise self._not_of_the_protocol(error) from error
        if known and self.model not in known:
            _log.warning("%s does not list the model %s, but %s", self._settings.url, self.model, self._said(listed))

    def _may_pass(self, error: BaseException) -> bool:
        """Say whether another attempt may help."""
        import openai

        if isinstance(error, openai.RateLimitError):
            return error.code != "insufficient_quota"
        if isinstance(error, openai.APIStatusError):
            return error.status_code in PASSING_STATUSES or error.status_code >= 500
        return isinstance(error, openai.APIConnectionError)

    def _given_up(self, error: BaseException) -> EngineError:
        """Say what is wrong with the server, after the last attempt."""
        import openai

        if self._may_pass(error):
            return self._stopped_answering(error)
        return self._refusal(error) if isinstance(error, openai.APIStatusError) else self._not_of_the_protocol(error)

    def _not_of_the_protocol(self, error: BaseException) -> EngineError:
        """Say that something else answers there."""
        return self._error(
            f"its answers are not of the protocol ({self._said(error)})", "Correct `url`: most end in /v1"
        )

    async def _complete(self, client: Any, task: str, query_id: str, query: str) -> Answer:
        """Send one request, in the strictest format that the server takes."""
        import openai

        for format_, name in enumerate(_FORMATS[self._format :], start=self._format):
            try:
                answer = await client.chat.completions.create(**self._request(task, query_id, query, name))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                # Either the format, which the next one shows, or the query itself.
                refused = error
                continue
            except openai.APIStatusError as error:
                if error.status_code not in QUERY_STATUSES:
                    raise
                raise LostQueryError("the server refused the query", str(error)) from error
            except (openai.APIResponseValidationError, ValueError, TypeError, AttributeError) as error:
                raise NoReplyError(f"an answer that is not of the protocol: {error}") from error
            if format_ > self._format:
                self._format = format_
                _log.warning(
                    "%s refuses the format %s (%s): asking with %s from here on",
                    self._settings.url, _FORMATS[format_ - 1], self._said(refused), name,
                )  # fmt: skip
            return self._read(answer)
        raise LostQueryError("the server refused the query", str(refused))

    def _read(self, answer: Any) -> Answer:
        """Return what the LLM wrote; raise if it is nothing. The client does not check what the server sends."""
        used = getattr(answer, "usage", None)
        tokens = [token_count(getattr(used, name, 0)) for name in ("prompt_tokens", "completion_tokens")]
        try:
            choice = answer.choices[0]
            text, reason = choice.message.content, choice.finish_reason
        except (AttributeError, TypeError, LookupError) as error:
            raise NoReplyError(f"an answer that is not of the protocol: {self._said(answer)}") from error
        if isinstance(text, str) and text:
            return Answer(text, *tokens)
        if reason == "length":
            raise LostQueryError("max_tokens ended before the reply began", str(answer), *tokens)
        if reason == "content_filter" or getattr(choice.message, "refusal", None):
            raise LostQueryError("the LLM refused to reply", str(answer), *tokens)
        raise NoReplyError(f"an empty reply: {self._said(answer)}")

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
        changes = self._settings.request
        kept = {key: value for key, value in request.items() if changes.get(key, "") is not None}
        # As `extra_body`: the client refuses keys that it does not know, and servers have keys of their own.
        return kept | {"messages": messages, "extra_body": {k: v for k, v in changes.items() if v is not None}}

    def _refusal(self, error: Any) -> EngineError:
        """Say that the server refuses: its own words, and what may help."""
        remedy = {
            401: f"Set the environment variable {self._settings.key_variable} to a valid key",
            403: f"Use a key that may use this model, in {self._settings.key_variable}",
            404: "Correct `url` (most end in /v1) and `model`",
            429: "Pay for more, or wait",
        }.get(error.status_code, "Correct the engine's settings")
        return self._error(f"it refuses with {error.status_code} ({self._said(error)})", remedy)
