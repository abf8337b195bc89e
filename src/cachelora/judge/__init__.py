"""Stage `judge`: does one answer serve a query and what was written for it? An LLM or a cross-encoder is asked."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from cachelora.augment.reply import RawReply
from cachelora.augment.shard import shard_of
from cachelora.errors import EngineError, InputError
from cachelora.files import Reject, check_reject_share, read_records
from cachelora.judge.prompt import SAME_ANSWER, pair_text
from cachelora.schemas import VERDICTS
from cachelora.text import digest

_log = logging.getLogger(__name__)


def pairs_to_judge(queries: pd.DataFrame, filtered: pd.DataFrame, shard: int, shards: int) -> pd.DataFrame:
    """List the texts of a shard that the filters have kept, beside their queries; none that are held out for the test.

    Parameters
    ----------
    queries : pandas.DataFrame
        Queries of a domain, in the columns of :data:`cachelora.schemas.QUERIES`.
    filtered : pandas.DataFrame
        Their texts, in the columns of :data:`cachelora.schemas.FILTERED`.
    shard, shards : int
        Which of how many shards, from 0.

    Returns
    -------
    pandas.DataFrame
        With columns query_id, query, text, and pair_id, which identifies the two texts.
    """
    mine = filtered["query_id"].map(lambda query_id: shard_of(query_id, shards) == shard).astype(bool)
    kept = filtered.loc[mine & (filtered["reasons"].map(len) == 0), ["query_id", "text"]]
    used = queries.loc[queries["split"] != "test", ["query_id", "query"]]
    pairs = kept.merge(used, on="query_id", validate="many_to_one")
    pairs["pair_id"] = [digest(pair_text(row.query, row.text)) for row in pairs.itertuples()]
    return pairs.drop_duplicates("pair_id").sort_values("query_id", kind="stable")


class Verdicts:
    """The verdicts on the pairs of a shard, counted as they come.

    Parameters
    ----------
    pairs : pandas.DataFrame
        As :func:`pairs_to_judge` gives them.
    most_failed : float
        Largest share of pairs without a verdict, in [0, 1].
    where : str
        The domain and shard, for messages.
    """

    def __init__(self, pairs: pd.DataFrame, most_failed: float, where: str) -> None:
        self.queries = {row.pair_id: pair_text(row.query, row.text) for row in pairs.itertuples()}
        self.reply_tokens = 0
        self._pairs = pairs
        self.most_failed = most_failed
        self._where = where
        self._found: dict[str, tuple[str, str, str, str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, raw: RawReply) -> None:
        """Take a reply of an engine.

        Parameters
        ----------
        raw : RawReply
            What it says of one of the pairs.

        Raises
        ------
        EngineError
            As :meth:`put`.
        """
        same = raw.value(SAME_ANSWER) if raw.failure is None else None
        self.reply_tokens += raw.reply_tokens
        self.put(raw.query_id, same if isinstance(same, bool) else None, raw.engine, raw.model, raw.prompt_version)

    def put(self, pair_id: str, same: bool | None, engine: str, model: str, prompt_version: str) -> None:
        """Take a verdict.

        Parameters
        ----------
        pair_id : str
            The pair.
        same : bool or None
            Whether one answer serves both; None if nothing was said.
        engine, model, prompt_version : str
            Who said it, asked with what.

        Raises
        ------
        EngineError
            If more pairs have no verdict than may be.
        """
        verdict = {True: "same", False: "different", None: "none"}[same]
        self._found[pair_id] = (verdict, engine, model, prompt_version)
        self._counts[verdict] += 1
        if self._counts["none"] > self.most_failed * len(self.queries):
            raise EngineError(
                self._where,
                f"{self._counts['none']} of {len(self.queries)} pairs got no verdict, more than judge.max_failed_share "
                f"{self.most_failed:g} allows",
                "Use a stronger model, or raise that share",
            )

    @property
    def progress(self) -> str:
        """The verdicts so far, for the log."""
        return ", ".join(f"{self._counts[name]} {name}" for name in ("same", "different", "none"))

    def table(self) -> pd.DataFrame:
        """Return the verdicts.

        Returns
        -------
        pandas.DataFrame
            In the columns of :data:`cachelora.schemas.VERDICTS`, in the order of the pairs.
        """
        rows = [(row.query_id, row.text, *self._found[row.pair_id]) for row in self._pairs.itertuples()]
        return pd.DataFrame(rows, columns=VERDICTS.names)

    def recording(self) -> str:
        """Return the verdicts in the form that the engine ``recorded`` replays.

        Returns
        -------
        str
            JSON lines, one a pair.
        """
        lines = []
        for row in self._pairs.itertuples():
            verdict, engine, model, prompt_version = self._found[row.pair_id]
            record = {"query": row.query, "text": row.text, "verdict": verdict}
            record |= {"engine": engine, "model": model, "prompt_version": prompt_version}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        return "".join(lines)


def recorded_verdicts(path: str | Path, max_reject_share: float) -> dict[str, dict[str, Any]]:
    """Read verdicts that were recorded.

    Parameters
    ----------
    path : str or Path
        JSON lines with ``query``, ``text``, ``verdict`` (same, different or none) and ``model``.
    max_reject_share : float
        Largest share of bad records, in [0, 1].

    Returns
    -------
    dict of str to dict
        The records by the digest of their pair.

    Raises
    ------
    InputError
        If the file is missing, empty, or holds too many bad records.
    """
    records, rejects = read_records(path)
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        fields = record.fields
        missing = [key for key in ("query", "text", "verdict", "model") if not isinstance(fields.get(key), str)]
        reason = None
        if missing:
            reason = f"no text under {', '.join(map(repr, missing))}"
        elif fields["verdict"] not in ("same", "different", "none"):
            reason = "'verdict' is not same, different or none"
        elif found.setdefault(digest(pair_text(fields["query"], fields["text"])), fields) is not fields:
            reason = "this pair is recorded above"
        if reason:
            rejects.append(Reject(record.line, reason, str(fields)[:200]))
    check_reject_share(path, len(found), rejects, max_reject_share, "queries.max_reject_share")
    for reject in rejects:
        _log.warning("%s, line %d, set aside: %s", path, reject.line, reject.reason)
    return found


def replay(path: str | Path, verdicts: Verdicts, max_reject_share: float) -> None:
    """Take the verdicts on all pairs from a recording.

    A few pairs may have none: similarities differ in the last digits from machine to machine, so that a text near a
    threshold is kept on one and dropped on the other.

    Parameters
    ----------
    path : str or Path
        The recording.
    verdicts : Verdicts
        The pairs; it takes the verdicts.
    max_reject_share : float
        As :func:`recorded_verdicts`.

    Raises
    ------
    InputError
        As :func:`recorded_verdicts`; also if more pairs have no verdict in it than may be.
    """
    recorded = recorded_verdicts(path, max_reject_share)
    absent = [asked for pair_id, asked in verdicts.queries.items() if pair_id not in recorded]
    if len(absent) > verdicts.most_failed * len(verdicts.queries):
        raise InputError(
            str(path),
            f"no recorded verdict for {len(absent)} of {len(verdicts.queries)} pairs, first: {absent[0][:120]}",
            "Judge them with a live engine: set judge.engine, or raise judge.max_failed_share",
        )
    meaning = {"same": True, "different": False, "none": None}
    for pair_id in verdicts.queries:
        fields = recorded.get(pair_id, {"verdict": "none", "engine": "recorded", "model": "", "prompt_version": ""})
        engine, version = (str(fields.get(key, "recorded")) for key in ("engine", "prompt_version"))
        verdicts.put(pair_id, meaning[fields["verdict"]], engine, fields["model"], version)
