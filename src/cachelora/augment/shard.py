"""A shard of a domain's queries: what came back for it, counted as it comes."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from cachelora.augment.reply import RawReply, Reply, check_reply
from cachelora.config import Augment
from cachelora.errors import EngineError
from cachelora.schemas import AUGMENTED
from cachelora.text import digest

_log = logging.getLogger(__name__)

_EXAMPLES = 5


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


class Shard:
    """The replies to the queries of a shard.

    Parameters
    ----------
    queries : sequence of (str, str)
        Digest and text of each query.
    settings : Augment
        ``max_chars``, the ``paraphrases`` and ``negatives`` that make a query complete, and ``max_failed_share``.
    where : str
        The domain and shard, for messages.
    remedy : str
        What to do when too many queries fail.
    """

    def __init__(self, queries: Sequence[tuple[str, str]], settings: Augment, where: str, remedy: str) -> None:
        self.queries = dict(queries)
        self.where = where
        self.ends: Counter[str] = Counter()
        self.reply_tokens = 0
        self._settings = settings
        self._remedy = remedy
        self._raw: dict[str, RawReply] = {}
        self._replies: dict[str, Reply] = {}
        self._failed: list[Reply] = []

    @property
    def progress(self) -> str:
        """How the queries have ended so far, for the log."""
        return ", ".join(f"{self.ends[end]} {end}" for end in ("complete", "partial", "failed"))

    def add(self, raw: RawReply) -> None:
        """Take a reply.

        Parameters
        ----------
        raw : RawReply
            The reply to one of the queries.

        Raises
        ------
        EngineError
            If more queries of the shard have failed than the settings allow, whatever the others bring.
        """
        reply = check_reply(raw, self.queries[raw.query_id], self._settings.max_chars)
        self._raw[raw.query_id], self._replies[raw.query_id] = raw, reply
        self.reply_tokens += raw.reply_tokens
        end = reply.end(self._settings.paraphrases, self._settings.negatives)
        self.ends[end] += 1
        if end == "failed":
            self._failed.append(reply)
        if len(self._failed) > self._settings.max_failed_share * len(self.queries):
            reasons = Counter(reason for failed in self._failed for reason in failed.refused)
            shown = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3)) or "nothing was written"
            examples = ", ".join(repr(example["query"][:60]) for example in self._failed_examples()[:3])
            raise EngineError(
                self.where,
                f"{len(self._failed)} of {len(self.queries)} queries failed, more than augment.max_failed_share = "
                f"{self._settings.max_failed_share:g} allows ({shown}), with {self.ends.total()} asked; for example "
                f"{examples}",
                self._remedy,
            )

    def table(self) -> pd.DataFrame:
        """Return the good texts.

        Returns
        -------
        pandas.DataFrame
            Rows in the columns of :data:`cachelora.schemas.AUGMENTED`, in the order of the queries.
        """
        rows = [
            (query_id, kind, text, reply.engine, reply.model, reply.prompt_version)
            for query_id, reply in self._in_order(self._replies)
            for kind, text in reply.texts
        ]
        return pd.DataFrame(rows, columns=AUGMENTED.names)

    def recording(self) -> str:
        """Return what was replied in the form that the engine ``recorded`` replays.

        Returns
        -------
        str
            JSON lines, one a query, in the order of their digests.
        """
        lines = []
        for query_id, raw in sorted(self._raw.items()):
            record = {"query": self.queries[query_id]}
            record |= {task: _recorded(raw.value(task)) for task in ("paraphrases", "negatives") if raw.failure is None}
            record |= {"model": raw.model, "prompt_version": raw.prompt_version, "engine": raw.engine}
            record |= {"failure": raw.failure} if raw.failure is not None else {}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        return "".join(lines)

    def summary(self) -> dict[str, Any]:
        """Count what came back, and say it in the log.

        Returns
        -------
        dict
            ``queries`` by their end, ``texts`` by kind, ``refused`` texts by reason, some ``failed_examples`` with
            their reasons, and the ``tokens`` that it took.
        """
        replies = [reply for _, reply in self._in_order(self._replies)]
        refused = Counter[str]()
        for reply in replies:
            refused.update(reply.refused)
        ends = {end: self.ends[end] for end in ("complete", "partial", "failed")}
        _log.info("%s: %d queries: %s", self.where, len(replies), ", ".join(f"{n} {end}" for end, n in ends.items()))
        for reason, number in refused.most_common():
            _log.info("%s: %d times refused: %s", self.where, number, reason)
        return {
            "queries": ends,
            "texts": dict(sorted(Counter(kind for reply in replies for kind, _ in reply.texts).items())),
            "refused": dict(refused.most_common()),
            "failed_examples": self._failed_examples()[:_EXAMPLES],
            "tokens": {
                "prompt": sum(raw.prompt_tokens for raw in self._raw.values()),
                "reply": self.reply_tokens,
            },
        }

    def _failed_examples(self) -> list[dict[str, Any]]:
        """List the failed queries with their reasons."""
        return [{"query": self.queries[reply.query_id], "refused": reply.refused} for reply in self._failed]

    def _in_order(self, replies: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Iterate in the order of the queries."""
        return ((query_id, replies[query_id]) for query_id in self.queries)


def _recorded(value: Any) -> Any:
    """Return what a reply holds in a form that is read again as the same: texts, and what else is refused alike."""
    if not isinstance(value, list):
        return None
    return [
        {key: _recorded_text(item[key]) for key in ("kind", "text") if key in item}
        if isinstance(item, dict)
        else _recorded_text(item)
        for item in value
    ]


def _recorded_text(text: Any) -> str | None:
    """Return a text; one with half a surrogate pair, which no file can hold, with another control character for it."""
    return re.sub("[\ud800-\udfff]", "\0", text) if isinstance(text, str) else None


def recording_key(line: str) -> str:
    """Return what the lines of a recording are in order of.

    Parameters
    ----------
    line : str
        A line that :meth:`Shard.recording` wrote.

    Returns
    -------
    str
        The digest of its query.
    """
    return digest(json.loads(line)["query"])
