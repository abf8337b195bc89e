"""What the engines that ask a server have in common: many requests in flight, patience, and nothing lost."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from cachelora.augment.prompt import TASKS, Prompts, query_seed
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
    """The server answered, but with nothing in it; another attempt may bring a reply."""


class LostQueryError(Exception):
    """A query gets no reply, however often it is asked, and others do.

    Parameters
    ----------
    reason : str
        Why, as it is counted: the same words for the same cause.
    said : str
        What the server said.
    """

    def __init__(self, reason: str, said: str) -> None:
        super().__init__(said)
        self.reason = reason


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
    secret : str
        What must not show in messages; empty if there is none.
    """

    type: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]

    def __init__(self, settings: ServerEngine, prompts: Prompts, seed: int, secret: str) -> None:
        self._settings = settings
        self._prompts = prompts
        self._seed = seed
        self._secret = secret
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
        stopped: EngineError | None = None
        lost_in_a_row = 0
        async with self._client() as client:
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
                            reply = task.result()
                            lost_in_a_row = lost_in_a_row + 1 if reply.failure else 0
                            yield reply
                    if lost_in_a_row >= max(self._settings.concurrency, _LEAST_LOST_IN_A_ROW):
                        stopped = stopped or self._error(
                            f"none of the last {lost_in_a_row} queries got a reply (the last: {reply.failure})",
                            "The job's log says more; what the server has answered is kept",
                        )
                    if not stopped:
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
        for task in TASKS:
            try:
                answer = await self._insist(client, task, query_id, query)
            except LostQueryError as error:
                failure = error.reason
                _log.warning("query %s: %s: %s", query_id, failure, self._said(error))
                break
            except (TimeoutError, NoReplyError) as error:
                late = f"no whole reply within {self._settings.timeout:g} s"
                failure = late if isinstance(error, TimeoutError) else "an empty reply"
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
                reraise=True,
            ):  # fmt: skip
                with attempt:
                    # The clients' own timeouts are for each read, and let a reply that trickles in go on for ever.
                    async with asyncio.timeout(self._settings.timeout):
                        return await self._complete(client, task, query_id, query)
        except (TimeoutError, NoReplyError, LostQueryError):
            raise
        except Exception as error:
            raise self._given_up(error) from error
        raise AssertionError("tenacity ends by a return or an exception")

    def _query_seed(self, query_id: str) -> int:
        """Return the seed of a query."""
        return query_seed(self._seed, query_id)

    def _stopped_answering(self, error: BaseException) -> EngineError:
        """Say that the server went away."""
        return self._error(
            f"it stopped answering ({self._said(error)}), {self._settings.attempts} times",
            "What it has answered is kept: run again when it is back",
        )

    def _error(self, what: str, remedy: str) -> EngineError:
        """Make an error that names the server."""
        return EngineError(f"engine {self.type}, {self._settings.url}", what, remedy)

    def _said(self, error: BaseException | None) -> str:
        """Return an error's words on one line, without the secret: some servers repeat it."""
        words = " ".join((str(error) or type(error).__name__).split())[:300]
        return words.replace(self._secret, "***") if self._secret else words


def _wait(state: Any) -> float:
    """Wait as long as the server wants, else twice as long each time, with jitter."""
    import tenacity

    response = getattr(state.outcome.exception(), "response", None)
    wanted = retry_after(response.headers.get("retry-after", "")) if response is not None else None
    if wanted is not None:
        return min(wanted, _LONGEST_WANTED_SECONDS)
    return tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT_SECONDS)(state)


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
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
