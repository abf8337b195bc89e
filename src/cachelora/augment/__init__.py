"""Stage `augment`: paraphrases and hard negatives for every query, from an LLM engine or a recording.

An engine is a class with a ``type`` and a method ``replies(queries)`` that yields a
:class:`~cachelora.augment.reply.RawReply` for each query; one file each.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from cachelora.augment.journal import Journal
from cachelora.augment.llamacpp import LlamaCpp
from cachelora.augment.openai import OpenAI
from cachelora.augment.recorded import Recorded
from cachelora.augment.reply import RawReply, check_reply
from cachelora.config import Augment
from cachelora.errors import EngineError
from cachelora.schemas import AUGMENTED

__all__ = ["LlamaCpp", "OpenAI", "Recorded", "augmented_table", "query_live", "shard_of", "shard_queries"]

_log = logging.getLogger(__name__)


def shard_of(query_id: str, shards: int) -> int:
    """Return the shard that a query belongs to.

    Parameters
    ----------
    query_id : str
        Its digest.
    shards : int
        Number of shards.

    Returns
    -------
    int
        From 0 to shards - 1; it depends on nothing but the two.
    """
    return int(query_id, 16) % shards


def shard_queries(queries: pd.DataFrame, shard: int, shards: int) -> list[tuple[str, str]]:
    """List the queries of a shard that are to be augmented.

    Parameters
    ----------
    queries : pandas.DataFrame
        Queries of a domain, in the columns of :data:`cachelora.schemas.QUERIES`.
    shard, shards : int
        Which of how many shards, from 0.

    Returns
    -------
    list of (str, str)
        Digest and text of each canonical query of the shard.
    """
    canonical = queries[queries["canonical"]]
    mine = canonical["query_id"].map(lambda query_id: shard_of(query_id, shards) == shard).astype(bool)
    return list(canonical.loc[mine, ["query_id", "query"]].itertuples(index=False, name=None))


def query_live(
    engine: LlamaCpp | OpenAI, queries: Sequence[tuple[str, str]], journal_root: str | Path, shard: str
) -> list[RawReply]:
    """Ask a live engine for what its journal does not hold yet.

    Parameters
    ----------
    engine : LlamaCpp or OpenAI
        The engine.
    queries : sequence of (str, str)
        Digest and text of each query.
    journal_root : str or Path
        Where journals are kept.
    shard : str
        Name of the shard, for its journal file.

    Returns
    -------
    list of RawReply
        One for each query, in their order.

    Raises
    ------
    EngineError
        If another process is writing the same shard, or the engine gives up.
    """
    journal = Journal(journal_root, engine.identity, shard)
    with journal.writer() as writer:
        replies = journal.finished()
        missing = [query for query in queries if query[0] not in replies]
        _log.info("%d queries, %d of them in the journal", len(queries), len(queries) - len(missing))
        start = time.monotonic()
        for number, reply in enumerate(engine.replies(missing), start=1):
            # A rerun asks again for what failed.
            if reply.failure is None:
                writer.add(reply)
            replies[reply.query_id] = reply
            rate = number / (time.monotonic() - start)
            _log.info(
                "%d/%d queries, %.2f a second, %.0f s left", number, len(missing), rate, (len(missing) - number) / rate
            )
    return [replies[query_id] for query_id, _ in queries]


def augmented_table(
    queries: Sequence[tuple[str, str]], replies: Iterable[RawReply], engine_type: str, settings: Augment, where: str
) -> pd.DataFrame:
    """Check the replies of a shard and make its table; stop if too many of its queries failed.

    Parameters
    ----------
    queries : sequence of (str, str)
        Digest and text of each query of the shard.
    replies : iterable of RawReply
        One for each query, in their order.
    engine_type : str
        The type of the engine that gave them.
    settings : Augment
        ``max_chars``, the ``paraphrases`` and ``negatives`` that make a query complete, and ``max_failed_share``.
    where : str
        The domain and shard, for the message.

    Returns
    -------
    pandas.DataFrame
        Rows in the columns of :data:`cachelora.schemas.AUGMENTED`.

    Raises
    ------
    EngineError
        If the share of failed queries is above the limit.
    """
    rows, ends, refused, failures = [], Counter(), Counter(), []
    for (_, query), raw in zip(queries, replies, strict=True):
        reply = check_reply(raw, query, settings.max_chars)
        refused.update(reply.refused)
        if reply.failed:
            ends["failed"] += 1
            failures.append(reply)
        else:
            ends["complete" if reply.complete(settings.paraphrases, settings.negatives) else "partial"] += 1
        for kind, text in reply.texts:
            rows.append((reply.query_id, kind, text, engine_type, reply.model, reply.prompt_version))
    total = ends.total()
    _log.info("%s: %d queries: %s", where, total, ", ".join(f"{n} {end}" for end, n in ends.most_common()) or "none")
    for reason, number in refused.most_common():
        _log.info("%s: %d texts refused: %s", where, number, reason)
    if len(failures) > settings.max_failed_share * total:
        reasons = Counter(reason for reply in failures for reason in reply.refused)
        shown = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3)) or "nothing was written"
        raise EngineError(
            where,
            f"{len(failures)} of {total} queries failed, more than augment.max_failed_share = "
            f"{settings.max_failed_share:g} allows ({shown}); first: {failures[0].query_id}",
            "Mend the recording: each record needs `paraphrases` and `negatives`"
            if engine_type == Recorded.type
            else "Use a stronger model, ask for less, or raise that share",
        )
    return pd.DataFrame(rows, columns=AUGMENTED.names)
