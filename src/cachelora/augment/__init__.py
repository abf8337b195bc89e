"""Stage `augment`: paraphrases and hard negatives for every query, from an LLM engine or a recording.

An engine is a class with the attributes and methods of :class:`~cachelora.augment.engine.Engine`; one file each.
"""

import logging
import time
from pathlib import Path
from typing import Any, Protocol

from cachelora.augment.engine import Engine
from cachelora.augment.journal import Journal
from cachelora.augment.reply import RawReply


class Replies(Protocol):
    """What takes the replies of an engine, and counts them.

    Attributes
    ----------
    queries : dict of str to str
        What is asked about, by digest.
    reply_tokens : int
        Tokens of the replies so far.
    progress : str
        How they went so far, for the log.
    """

    queries: dict[str, str]
    reply_tokens: int

    @property
    def progress(self) -> str:
        """How they went so far, for the log."""

    def add(self, raw: RawReply) -> None:
        """Take a reply."""


_log = logging.getLogger(__name__)


def query_live(engine: Engine, shard: Replies, journal_root: str | Path, name: str) -> dict[str, Any]:
    """Ask a live engine for what its journal does not hold yet.

    Parameters
    ----------
    engine : Engine
        The engine.
    shard : Replies
        What is asked about; it takes the replies.
    journal_root : str or Path
        Where journals are kept.
    name : str
        Name of the shard, for its journal file.

    Returns
    -------
    dict
        Of this run: the number of queries ``asked`` and ``from_journal``, and the ``seconds`` that the asking took.

    Raises
    ------
    EngineError
        If another process is writing the same shard, the engine gives up, or too many queries fail.
    """
    journal = Journal(journal_root, engine.identity, name)
    with journal.writer() as writer:
        finished = journal.finished(shard.queries)
        missing = [query for query in shard.queries.items() if query[0] not in finished]
        for query_id in shard.queries:
            if query_id in finished:
                shard.add(finished[query_id])
        total, known, tokens = len(shard.queries), len(shard.queries) - len(missing), shard.reply_tokens
        _log.info("%d to ask, %d of them in the journal", total, known)
        if missing:
            engine.start()
        start = time.monotonic()
        for number, reply in enumerate(engine.replies(missing), start=1):
            # A rerun asks again for what got no reply.
            if reply.failure is None:
                writer.add(reply)
            shard.add(reply)
            seconds = time.monotonic() - start
            _log.info(
                "%d/%d (%s), %.2f a second, %.0f tokens a second, %.0f s left",
                known + number, total, shard.progress, number / seconds,
                (shard.reply_tokens - tokens) / seconds, (len(missing) - number) * seconds / number,
            )  # fmt: skip
        return {"asked": len(missing), "from_journal": known, "seconds": round(time.monotonic() - start, 3)}
