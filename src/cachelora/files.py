"""Files that are either whole or absent, and records with everything that is wrong about them."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cachelora.errors import DamagedError, InputError


@dataclass(frozen=True)
class Reject:
    """A record that was set aside.

    Attributes
    ----------
    line : int
        Line of the file, or row of a Parquet file, counted from 1; 0 for what was made from several.
    reason : str
        What is wrong with it.
    text : str
        The start of the record, with what is not UTF-8 escaped.
    """

    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class Record:
    """A record as it was read.

    Attributes
    ----------
    line : int
        Line of the file, or row of a Parquet file, counted from 1.
    fields : dict
        Its keys and values.
    """

    line: int
    fields: dict[str, Any]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside a file, which takes the file's place when the block ends without an error.

    Parameters
    ----------
    path : str or Path
        The file to make or replace.

    Yields
    ------
    Path
        Where to write. On an error it is removed and the old file, if any, stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        make_readable(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_readable(path: Path) -> None:
    """Give a file the mode of any new file; some libraries make files that only their owner can read.

    Parameters
    ----------
    path : Path
        The file.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file.
    text : str
        Its content; a final line end is added if it is missing.
    """
    with replacing(path) as temporary:
        temporary.write_text(text if text.endswith("\n") or not text else text + "\n", encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file for reading by people too, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file.
    value : Any
        Anything that JSON can hold; NaN is refused.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def write_rejects(path: str | Path, rejects: Iterable[Reject]) -> None:
    """Write rejects as JSON lines.

    Parameters
    ----------
    path : str or Path
        The file; empty if there are none.
    rejects : iterable of Reject
        What was set aside.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for reject in rejects:
            stream.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")


def write_table(path: str | Path, table: pd.DataFrame, schema: pa.Schema) -> None:
    """Write a Parquet file in exactly the given schema, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file.
    table : pandas.DataFrame
        The rows; its columns are taken by name and must be those of the schema.
    schema : pyarrow.Schema
        The contract (see :mod:`cachelora.schemas`).

    Raises
    ------
    KeyError, pyarrow.ArrowInvalid
        If the table does not fit the schema: a mistake of the caller, not of the user.
    """
    arrow = pa.Table.from_pandas(table[schema.names], schema=schema, preserve_index=False)
    with replacing(path) as temporary:
        pq.write_table(arrow.replace_schema_metadata(schema.metadata), temporary, write_page_checksum=True)


def read_table(path: str | Path, schema: pa.Schema) -> pd.DataFrame:
    """Read a Parquet file and check it against its contract.

    Parameters
    ----------
    path : str or Path
        The file.
    schema : pyarrow.Schema
        The contract that the file was written in.

    Returns
    -------
    pandas.DataFrame
        Its rows.

    Raises
    ------
    DamagedError
        If it is no Parquet file, or has other columns or types.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        rows = table.to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    _check_schema(path, table.schema, schema)
    return rows


def iterate_table(path: str | Path, schema: pa.Schema, rows_at_once: int = 10_000) -> Iterator[dict[str, Any]]:
    """Go through the rows of a Parquet file without holding them in memory, and check it against its contract.

    Parameters
    ----------
    path : str or Path
        The file.
    schema : pyarrow.Schema
        The contract that the file was written in.
    rows_at_once : int
        Rows read at a time.

    Yields
    ------
    dict
        A row.

    Raises
    ------
    DamagedError
        As :func:`read_table`.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(path, file.schema_arrow, schema)
            for batch in file.iter_batches(rows_at_once):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> DamagedError:
    """Say that a Parquet file cannot be read."""
    return DamagedError(str(path), f"not a readable Parquet file ({_first_line(error)})", "Delete it and run again")


def _check_schema(path: str | Path, found: pa.Schema, schema: pa.Schema) -> None:
    """Refuse a file with other columns or types than its contract's."""
    if not found.equals(schema, check_metadata=False):
        expected = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DamagedError(
            str(path), f"its columns are not those of its contract ({expected})", "Delete it and run again"
        )


def read_json(path: str | Path) -> Any:
    """Read a JSON file that an earlier stage wrote.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    Any
        Its value.

    Raises
    ------
    DamagedError
        If it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(str(path), f"not readable JSON ({_first_line(error)})", "Delete it and run again") from error


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_file(source: str, mirror: str | Path | None) -> Path | None:
    """Find a file on this machine.

    Parameters
    ----------
    source : str
        A path, or an address with ``://`` in it.
    mirror : str, Path or None
        Folder in which the name at the end of the source is looked for, if the source is no file itself.

    Returns
    -------
    Path or None
        The file; None if there is none.
    """
    if "://" not in source and Path(source).is_file():
        return Path(source)
    if mirror is not None and (found := Path(mirror, name_of(source))).is_file():
        return found
    return None


def name_of(source: str) -> str:
    """Return the name at the end of a path or an address.

    Parameters
    ----------
    source : str
        As for :func:`find_file`.

    Returns
    -------
    str
        The name of a file, without a folder.
    """
    return PurePosixPath(unquote(urlsplit(source).path) if "://" in source else source).name


def read_records(path: str | Path) -> tuple[list[Record], list[Reject]]:
    """Read the records of a file whose ending names its format.

    Parameters
    ----------
    path : str or Path
        ``.jsonl`` or ``.ndjson`` (an object a line), ``.csv`` (with a header), ``.parquet``, or ``.txt`` (a query a
        line). All but Parquet are UTF-8; empty lines are passed over.

    Returns
    -------
    records : list of Record
        In the file's order.
    rejects : list of Reject
        The lines that could not be read.

    Raises
    ------
    InputError
        If the file is missing, unreadable or empty, or of another format.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(str(path), f"unknown format '{path.suffix}'", f"Use one of {', '.join(sorted(_READERS))}")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", "Put it there, or correct the path") from error
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})", "Make it a readable file") from error
    if reader is not _read_parquet and (content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content):
        raise InputError(str(path), "not UTF-8 text: UTF-16, or binary", "Save it as UTF-8")
    records, rejects = reader(path, content)
    if not records and not rejects:
        raise InputError(str(path), "the file is empty", "Give at least one record")
    return records, rejects


def check_reject_share(path: str | Path, records: int, rejects: list[Reject], limit: float, key: str) -> None:
    """Stop when too many records of a file were set aside.

    Parameters
    ----------
    path : str or Path
        The file that the records came from.
    records : int
        How many records are good.
    rejects : list of Reject
        The others.
    limit : float
        Largest share of rejects, in [0, 1].
    key : str
        The config key of that limit.

    Raises
    ------
    InputError
        If the share is above the limit, or nothing good is left.
    """
    total = records + len(rejects)
    if rejects and (len(rejects) > limit * total or not records):
        first = rejects[0]
        raise InputError(
            f"{path}, line {first.line}",
            f"{first.reason}; {len(rejects)} of {total} records are bad, more than {key} = {limit:g} allows"
            if records
            else f"{first.reason}; none of the {total} records is good",
            "Mend the file" + (" or raise that share" if records else ""),
        )


def _lines(content: bytes) -> Iterator[tuple[int, str | None, str]]:
    """Yield number, text (None if it is not UTF-8) and a printable form of each line that is not blank."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                yield number, None, line.decode("utf-8", "backslashreplace")
            else:
                yield number, text, text


def _read_jsonl(path: Path, content: bytes) -> tuple[list[Record], list[Reject]]:
    """Read an object a line."""
    records, rejects = [], []
    for number, text, shown in _lines(content):
        if text is None:
            rejects.append(_reject(number, "not UTF-8", shown))
            continue
        try:
            fields = json.loads(text)
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            rejects.append(_reject(number, "holds half a character (an unpaired surrogate)", shown))
            continue
        except (ValueError, RecursionError) as error:
            rejects.append(_reject(number, f"not JSON ({_first_line(error)})", shown))
            continue
        if isinstance(fields, dict):
            records.append(Record(number, fields))
        else:
            rejects.append(_reject(number, "not a JSON object", shown))
    return records, rejects


def _read_text(path: Path, content: bytes) -> tuple[list[Record], list[Reject]]:
    """Read a query a line."""
    records, rejects = [], []
    for number, text, shown in _lines(content):
        if text is None:
            rejects.append(_reject(number, "not UTF-8", shown))
        else:
            records.append(Record(number, {"query": text}))
    return records, rejects


def _read_csv(path: Path, content: bytes) -> tuple[list[Record], list[Reject]]:
    """Read rows under a header; a quoted field may hold line ends."""
    records, rejects = [], []
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        # The first access reads the header, so that the line numbers below start behind it.
        header = reader.fieldnames
    except csv.Error as error:
        raise InputError(str(path), f"its header is not CSV ({error})", "Mend the first line") from error
    if not header:
        return records, rejects
    while True:
        line = reader.reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return records, rejects
        except csv.Error as error:
            # A quote that is never closed swallows all that follows: each line of it is lost, and counts.
            rejects += [_reject(lost, f"not CSV ({error})", "") for lost in range(line, reader.reader.line_num + 1)]
            continue
        shown = ",".join(str(value) for value in fields.values())
        if any("\udc80" <= character <= "\udcff" for character in shown):
            rejects.append(_reject(line, "not UTF-8", shown.encode("utf-8", "backslashreplace").decode()))
        elif None in fields:
            rejects.append(_reject(line, "more fields than the header has", shown))
        else:
            records.append(Record(line, fields))


def _read_parquet(path: Path, content: bytes) -> tuple[list[Record], list[Reject]]:
    """Read the rows of a Parquet file."""
    try:
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(str(path), f"not a readable Parquet file ({_first_line(error)})", "Write it again") from error
    return [Record(number, fields) for number, fields in enumerate(rows, start=1)], []


_READERS: dict[str, Callable[[Path, bytes], tuple[list[Record], list[Reject]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _reject(line: int, reason: str, shown: str) -> Reject:
    """Make a reject with the start of the text."""
    return Reject(line, reason, shown[:200])


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]
