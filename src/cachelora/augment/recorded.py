"""Engine `recorded`: replays LLM replies that were written to a file."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from cachelora.augment.reply import RawReply
from cachelora.errors import InputError
from cachelora.files import Reject, check_reject_share, read_records
from cachelora.text import trivial_key

_log = logging.getLogger(__name__)


class Recorded:
    """Replays a recording, keyed by the normalised query.

    Parameters
    ----------
    recording : str or Path
        JSON lines with ``query``, ``paraphrases``, ``negatives``, ``model`` and ``prompt_version``; where a live engine
        wrote it, also ``engine``, and ``failure`` in place of texts that did not come.
    max_reject_share : float
        Largest share of bad records, in [0, 1].

    Raises
    ------
    InputError
        If the recording is missing, empty, or holds too many bad records.
    """

    type = "recorded"
    remedy = "Mend the recording: each record needs `paraphrases` and `negatives`"

    def __init__(self, recording: str | Path, max_reject_share: float) -> None:
        self._recording = recording
        records, rejects = read_records(recording)
        self._replies = {}
        for record in records:
            missing = [
                name for name in ("query", "model", "prompt_version") if not isinstance(record.fields.get(name), str)
            ]
            if missing:
                rejects.append(
                    Reject(record.line, f"no text under {', '.join(map(repr, missing))}", str(record.fields)[:200])
                )
            elif not isinstance(record.fields.get("failure") or "", str):
                rejects.append(Reject(record.line, "'failure' is not text", str(record.fields)[:200]))
            elif trivial_key(record.fields["query"]) in self._replies:
                rejects.append(Reject(record.line, "this query is recorded above", record.fields["query"][:200]))
            else:
                self._replies[trivial_key(record.fields["query"])] = record.fields
        check_reject_share(recording, len(self._replies), rejects, max_reject_share, "queries.max_reject_share")
        for reject in rejects:
            _log.warning("%s, line %d, set aside: %s", recording, reject.line, reject.reason)

    def replies(self, queries: Sequence[tuple[str, str]]) -> Iterator[RawReply]:
        """Replay the replies to some queries.

        Parameters
        ----------
        queries : sequence of (str, str)
            Digest and text of each query.

        Yields
        ------
        RawReply
            One for each query.

        Raises
        ------
        InputError
            If a query has no recording.
        """
        absent = [query for _, query in queries if trivial_key(query) not in self._replies]
        if absent:
            raise InputError(
                str(self._recording),
                f"no recorded reply for {len(absent)} of {len(queries)} queries, first: {absent[0][:80]!r}",
                "Record them, or set the domain's `engine` to a live one such as llamacpp",
            )
        for query_id, query in queries:
            fields = self._replies[trivial_key(query)]
            yield RawReply(
                query_id,
                fields,
                fields["model"],
                fields["prompt_version"],
                str(fields.get("engine") or self.type),
                failure=fields.get("failure") or None,
            )
