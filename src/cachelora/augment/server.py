"""What the engines that ask a server have in common: many requests in flight, patience, and nothing lost."""

import asyncio
import contextlib
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from cachelora.augment.prompt import Prompts
from cachelora.augment.reply import RawReply
from cachelora.config import ServerEngine
from cachelora.errors import EngineError
from cachelora.packages import installed_version, require_packages

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""A server that does not answer the first question within so long is taken to be down."""
_LONGEST_WAIT_SECONDS = 60.0
# What a server asks for is waited for, within reason.
_LONGEST_WANTED_SECONDS = 900.0
_LEAST_LOST_IN_A_ROW = 8

PASSING_STATUSES = frozenset((408, 409, 425, 429, 499))
"""What another attempt may turn into a reply, beside 5xx."""
QUERY_STATUSES = frozenset((400, 413, 414, 422, 451))
"""What concerns a query and not all of them."""


class Answer(NamedTuple):
    """What a server answered to one request.

    Attributes
    ----------
    text : str
        What the LLM wrote.
    prompt_tokens, reply_tokens : int
        What it took, in tokens; 0 where the server does not say.
    """

    text: str
    prompt_tokens: int = 0
    reply_tokens: int = 0


class NoReplyError(Exception):
    """The server answered with nothing, or nothing of its protocol; another attempt may bring a reply."""


class LostQueryError(Exception):
    """A query gets no reply, however often it is asked, and others do.

    Parameters
    ----------
    reason : str
        Why, as it is counted: the same words for the same cause.
    said : str
        What the server said.
    prompt_tokens, reply_tokens : int
        What it took all the same.
    """

    def __init__(self, reason: str, said: str, prompt_tokens: int = 0, reply_tokens: int = 0) -> None:
        super().__init__(said)
        self.reason = reason
        self.tokens = prompt_tokens, reply_tokens


class _StoppedError(Exception):
    """The job is over; no further attempt."""


class Server(ABC):
    """A server that is asked over HTTP.

    Parameters
    ----------
    settings : ServerEngine
        The server, the model, and how it is asked.
    prompts : Prompts
        What is asked.
    seed : int
        Seed of the LLM's sampling, for servers that take one.
    key_variable : str
        Environment variable that may hold a key; it must not show in messages.

    Raises
    ------
    EngineError
        If the variable holds what cannot be a key.
    """

    type: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]

    def __init__(self, settings: ServerEngine, prompts: Prompts, seed: int, key_variable: str) -> None:
        self._settings = settings
        self._prompts = prompts
        self._seed = seed
        # A file that it was read from often adds a line end.
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise EngineError(
                f"environment variable {key_variable}", "it holds characters that no key has", "Set it again"
            )
        self.version = installed_version(*self.packages[:1])
        self.model = settings.model
        self.prompt_version = prompts.version

    def start(self) -> None:
        """Reach the server.

        Raises
        ------
        EngineError
            If a package is not installed, or the server does not answer, refuses the key or lacks the model.
        """
        require_packages(self.type, *self.packages)
        asyncio.run(self._check())

    @abstractmethod
    async def _check(self) -> None:
        """Ask something that costs nothing, so that a server that is down or refuses is known in seconds."""

    @abstractmethod
    def _client(self) -> AbstractAsyncContextManager[Any]:
        """Make a client that neither waits nor tries again by itself."""

    @abstractmethod
    async def _complete(self, client: Any, task: str, query_id: str, query: str) -> Answer:
        """Send one request. Raises what the client raises, ``NoReplyError`` or ``LostQueryError``."""

    @abstractmethod
    def _may_pass(self, error: BaseException) -> bool:
        """Say whether another attempt may help."""

    @abstractmethod
    def _given_up(self, error: BaseException) -> EngineError:
        """Say what is wrong with the server, after the last attempt."""

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
        with asyncio.Runner() as runner:
            replies = self._replies(queries)

            async def following() -> RawReply | None:
                return await anext(replies, None)

            while (reply := runner.run(following())) is not None:
                yield reply

    async def _replies(self, queries: Sequence[tuple[str, str]]) -> AsyncIterator[RawReply]:
        """Keep so many requests in flight as the settings say."""
        waiting = iter(queries)
        stopped: Exception | None = None
        lost_in_a_row = 0
        self._stop = asyncio.Event()
        async with self._client() as client:
            flying = {
                asyncio.create_task(self._ask(client, *query)) for query in islice(waiting, self._settings.concurrency)
            }
            try:
                while flying:
                    done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if (error := task.exception()) is None:
                            reply = task.result()
                            lost_in_a_row = lost_in_a_row + 1 if reply.failure else 0
                            yield reply
                        elif not isinstance(error, _StoppedError):
                            stopped = stopped or error
                    if lost_in_a_row >= max(self._settings.concurrency, _LEAST_LOST_IN_A_ROW):
                        raise self._error(
                            f"none of the last {lost_in_a_row} queries got a reply (the last: {reply.failure})",
                            "The log says more; what the server has answered is kept",
                        )
                    if stopped:
                        # Requests under way may bring a reply that was paid for; no other begins.
                        self._stop.set()
                    else:
                        flying |= {
                            asyncio.create_task(self._ask(client, *query)) for query in islice(waiting, len(done))
                        }
            finally:
                for task in flying:
                    task.cancel()
        if stopped:
            raise stopped

    async def _ask(self, client: Any, query_id: str, query: str) -> RawReply:
        """Ask for everything about one query."""
        replied: dict[str, str] = {}
        prompt_tokens = reply_tokens = 0
        failure = None
        for task in self._prompts.tasks:
            try:
                answer = await self._insist(client, task, query_id, query)
            except LostQueryError as error:
                failure = error.reason
                prompt_tokens += error.tokens[0]
                reply_tokens += error.tokens[1]
                _log.warning("query %s: %s: %s", query_id, failure, self._said(error))
                break
            except (TimeoutError, NoReplyError) as error:
                late = f"no whole reply within {self._settings.timeout:g} s"
                failure = late if isinstance(error, TimeoutError) else "an empty or broken answer"
                _log.warning("query %s: %s, %d times", query_id, failure, self._settings.attempts)
                break
            replied[task] = answer.text
            prompt_tokens += answer.prompt_tokens
            reply_tokens += answer.reply_tokens
        return RawReply(
            query_id, replied, self.model, self.prompt_version, self.type, prompt_tokens, reply_tokens, failure
        )

    async def _insist(self, client: Any, task: str, query_id: str, query: str) -> Answer:
        """Ask for one task, again and again where that may help."""
        import tenacity

        def may_help(error: BaseException) -> bool:
            return isinstance(error, TimeoutError | NoReplyError) or self._may_pass(error)

        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(may_help),
                wait=_wait,
                stop=tenacity.stop_after_attempt(self._settings.attempts),
                before_sleep=lambda state: _log.info(
                    "query %s: %s; again in %.1f s",
                    query_id, self._said(state.outcome.exception()), state.next_action.sleep,
                ),
                sleep=self._pause,
                reraise=True,
            ):  # fmt: skip
                with attempt:
                    if self._stop.is_set():
                        raise _StoppedError
                    # The clients' own timeouts are for each read, and let a reply that trickles in go on for ever.
                    async with asyncio.timeout(self._settings.timeout):
                        return await self._complete(client, task, query_id, query)
        except (TimeoutError, NoReplyError, LostQueryError, _StoppedError):
            raise
        except Exception as error:
            raise self._given_up(error) from error
        raise AssertionError("tenacity ends by a return or an exception")

    async def _pause(self, seconds: float) -> None:
        """Wait, but not when all is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _stopped_answering(self, error: BaseException) -> EngineError:
        """Say that the server went away."""
        return self._error(
            f"it stopped answering ({self._said(error)}), {self._settings.attempts} times",
            "What it has answered is kept: run again when it is back",
        )

    def _error(self, what: str, remedy: str) -> EngineError:
        """Make an error that names the server."""
        return EngineError(f"engine {self.type}, {self._settings.url}", what, remedy)

    def _said(self, what: Any) -> str:
        """Return the words of an error or answer, short and on one line, without the key: some servers repeat it."""
        words = str(what) or type(what).__name__
        if self._key:
            words = words.replace(self._key, "***")
        return " ".join(words.split())[:300]


def _wait(state: Any) -> float:
    """Wait as long as the server wants, else twice as long each time, with jitter."""
    import tenacity

    error = state.outcome.exception()
    # Ollama's client keeps the response in the error that its own comes from.
    response = getattr(error, "response", None) or getattr(error.__context__, "response", None)
    wanted = retry_after(response.headers.get("retry-after", "")) if response is not None else None
    if wanted is not None:
        return min(wanted, _LONGEST_WANTED_SECONDS)
    return tenacity.wait_exponential_jitter(multiplier=1, max=_LONGEST_WAIT_SECONDS)(state)


def retry_after(header: str) -> float | None:
    """Read the header ``Retry-After`` (RFC 9110, 10.2.3).

    Parameters
    ----------
    header : str
        Seconds, or a date.

    Returns
    -------
    float or None
        Seconds from now, at least 0; None if it says nothing.
    """
    try:
        seconds = float(header)
        return None if math.isnan(seconds) else max(0.0, seconds)
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def token_count(value: Any) -> int:
    """Read a number of tokens that a server gives.

    Parameters
    ----------
    value : Any
        Should be a number.

    Returns
    -------
    int
        The number; 0 for anything else.
    """
    return int(value) if isinstance(value, int | float) and 0 <= value < math.inf else 0
