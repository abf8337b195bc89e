"""Finished replies of a live engine, kept as they come, so that a killed job repeats none of them.

They are kept unchecked: when the checks change, they are applied anew and no call is repeated.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, TypeAdapter

from cachelora.augment.reply import RawReply
from cachelora.errors import EngineError

_START = re.compile(rb'\s*\{\s*"query_id"\s*:\s*"([^"]*)"')
_REPLY = TypeAdapter(RawReply)

_log = logging.getLogger(__name__)


def identity_of(
    engine: str, model: Any, prompt_version: str, seed: int, settings: BaseModel, decisive: set[str]
) -> dict[str, Any]:
    """Return what determines an engine's replies.

    Parameters
    ----------
    engine : str
        Its type.
    model : Any
        What tells its LLM from others.
    prompt_version : str
        Digest of its prompts.
    seed : int
        Seed of the sampling.
    settings : pydantic.BaseModel
        Its settings.
    decisive : set of str
        Those of them that the replies depend on.

    Returns
    -------
    dict
        The journal's key.
    """
    asked = {"type": engine, "model": model, "prompt": prompt_version, "seed": seed}
    return asked | settings.model_dump(mode="json", include=decisive)


class Journal:
    """Append-only JSON lines, one a query, in a folder that stands for one engine, prompt and set of parameters.

    All shards of a domain share the folder, each with a file of its own, so that another number of shards finds the
    same replies.

    Parameters
    ----------
    root : str or Path
        Where the folders of all journals are.
    identity : dict
        What determines the replies; its digest names the folder.
    shard : str
        Name of the file that this writer appends to.
    """

    def __init__(self, root: str | Path, identity: dict[str, Any], shard: str) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = Path(root) / key
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / f"{shard}.jsonl"

    def finished(self, wanted: Collection[str]) -> dict[str, RawReply]:
        """Return the replies that any shard has finished.

        Parameters
        ----------
        wanted : collection of str
            The query_ids to look for; the lines of others are not parsed, nor kept in memory.

        Returns
        -------
        dict of str to RawReply
            By query_id. A last line that a kill cut short does not count.
        """
        replies = {}
        for path in filter(Path.is_file, sorted(self._folder.glob("*.jsonl"))):
            with path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    start = _START.match(line)
                    if start and start[1].decode("utf-8", "replace") not in wanted:
                        continue
                    try:
                        reply = _REPLY.validate_python(json.loads(line))
                    except (ValueError, RecursionError):
                        # The last line of a file that a kill cut short is no news.
                        if line.endswith(b"\n"):
                            _log.warning("%s, line %d is damaged: its query is asked again", path, number)
                        continue
                    if line.endswith(b"\n") and reply.query_id in wanted:
                        replies[reply.query_id] = reply
        return replies

    @contextmanager
    def writer(self, alone: bool = False) -> Iterator["Writer"]:
        """Open the journal for writing; no second process can.

        Parameters
        ----------
        alone : bool
            Whether no other shard may be written meanwhile either, because this writer's queries are of all shards.

        Yields
        ------
        Writer
            What takes the replies.

        Raises
        ------
        EngineError
            If another process is writing this shard, or all.
        """
        with (self._folder / "lock").open("a") as lock:
            _lock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, self._folder)
            with self._shard_writer() as writer:
                yield writer

    @contextmanager
    def _shard_writer(self) -> Iterator["Writer"]:
        """Open the file of the shard."""
        # Half a surrogate pair, which an LLM may write, becomes its JSON escape.
        with self._file.open("a+", encoding="utf-8", errors="backslashreplace") as stream:
            _lock(stream, fcntl.LOCK_EX, self._file)
            _drop_torn_line(self._file)
            yield Writer(stream)


class Writer:
    """Appends replies to a journal.

    Parameters
    ----------
    stream : file
        The open journal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def add(self, reply: RawReply) -> None:
        """Append a reply, on disk when this returns.

        Parameters
        ----------
        reply : RawReply
            A finished reply.
        """
        self._stream.write(json.dumps(asdict(reply), ensure_ascii=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _lock(stream: TextIO, kind: int, what: Path) -> None:
    """Lock a file, or say that another process has it."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EngineError(
            str(what),
            "another process is writing this shard, or an estimate all",
            "Wait for it, or end it, and run again",
        ) from error


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left unfinished."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("rb+") as stream:
            stream.truncate(whole)
