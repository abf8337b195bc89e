"""Stage `sets`: test sets of anybody's making, read and checked, and models measured on them.

A set is a file of labelled pairs or of triplets. It lies here, in a mirror folder, or behind an https address.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pandas as pd

from cachelora.config import Evaluate, LabelledSet
from cachelora.errors import InputError
from cachelora.evaluate import ALL_KINDS, measure
from cachelora.files import Record, find_file, name_of, read_records, replacing, sha256_of
from cachelora.models import score_pairs
from cachelora.schemas import KINDS, LABELLED, SCORES
from cachelora.text import connected_groups, digest, normalise, trivial_key

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MAX_BYTES = 500_000_000
"""Largest file that is fetched."""
TIMEOUT = 30
"""Seconds that a server may be silent."""

_TRIPLET = ("anchor", "positive", "negative")
_PAIR = ("a", "b", "label")
_SHOWN = {
    "margin": "margin",
    "ap": "AP",
    "roc_auc": "ROC-AUC",
    "accuracy": "accuracy",
    "recall_at_budget": "recall at {:g} % false hits",
    "hit_ratio_at_budget": "hit ratio at {:g} % false hits",
}


def fetch_set(url: str, folder: str | Path) -> Path:
    """Fetch the file of a set.

    Parameters
    ----------
    url : str
        Its https address.
    folder : str or Path
        Where it is put, under its own name.

    Returns
    -------
    Path
        The file, whole: it is fetched under a temporary name.

    Raises
    ------
    InputError
        If there is no network, the server does not give it or sends to an address that is not https, or it is larger
        than :data:`MAX_BYTES`.
    """
    path, received = Path(folder, name_of(url)), 0
    try:
        with (
            build_opener(_HttpsOnly).open(Request(url, headers={"User-Agent": "cachelora"}), timeout=TIMEOUT) as reply,
            replacing(path) as temporary,
            temporary.open("wb") as stream,
        ):
            while part := reply.read(1 << 20):
                received += len(part)
                if received > MAX_BYTES:
                    raise InputError(url, f"it is larger than {MAX_BYTES // 10**6} MB", "Fetch a part of it by hand")
                stream.write(part)
    except HTTPError as error:
        raise InputError(url, f"the server does not give it ({error.code} {error.reason})", "Correct it") from error
    except (OSError, HTTPException, ValueError) as error:
        first = str(getattr(error, "reason", error)).partition("\n")[0]
        raise InputError(
            url, f"it cannot be fetched ({first})", f"Put {path.name} into a folder and name that as `mirror`"
        ) from error
    return path


class _HttpsOnly(HTTPRedirectHandler):
    """Follows to https addresses only."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        """Refuse what could be read, or changed, on its way."""
        if urlsplit(newurl).scheme != "https":
            raise InputError(req.full_url, "it leads to an address that is not https", "Use another")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def read_sets(names: Sequence[str], known: Mapping[str, LabelledSet], mirror: str | Path | None) -> pd.DataFrame:
    """Read sets by their names, and files.

    Parameters
    ----------
    names : sequence of str
        Names of sets that are known, or paths.
    known : mapping of str to LabelledSet
        The sets of the configuration.
    mirror : str, Path or None
        As for :func:`cachelora.files.find_file`.

    Returns
    -------
    pandas.DataFrame
        In the columns of :data:`cachelora.schemas.LABELLED`, ``test_set`` being the name or path.

    Raises
    ------
    InputError
        If a set is nowhere, or as :func:`fetch_set` and :func:`read_set`.
    """
    tables = []
    with TemporaryDirectory() as folder:
        for name in dict.fromkeys(names):
            source, sha256 = (known[name].source, known[name].sha256) if name in known else (name, None)
            if "://" in source and sha256 is None:
                raise InputError(source, "an address needs a SHA-256", "Declare it under `sets`, and give its name")
            path = find_file(source, mirror)
            if path is None and "://" in source:
                path = fetch_set(source, folder)
            if path is None:
                listed = f", or use one of the `sets`: {', '.join(known)}" if known else ""
                raise InputError(source, "no such file", f"Correct the path, or name its folder as `mirror`{listed}")
            tables.append(read_set(path, name, sha256))
    return pd.concat(tables, ignore_index=True)


def read_set(path: str | Path, name: str, sha256: str | None = None) -> pd.DataFrame:
    """Read a file of labelled pairs or of triplets.

    Parameters
    ----------
    path : str or Path
        Records with ``a``, ``b`` and ``label`` (1 if one answer serves both, else 0), or with ``anchor``, ``positive``,
        ``negative`` and perhaps ``kind``.
    name : str
        What the set is called.
    sha256 : str, optional
        SHA-256 that the file must have.

    Returns
    -------
    pandas.DataFrame
        A row for each pair, two for each triplet, in the columns of :data:`cachelora.schemas.LABELLED`. What stands in
        the file twice is counted in the log and taken once. Pairs that share a text, directly or through others, share
        a group.

    Raises
    ------
    InputError
        If the file or a record cannot be read, it is not the file that the SHA-256 is of, a pair has both labels, or
        there is no pair of one of the two labels.
    """
    records, rejects = read_records(path)
    found = sha256_of(path)
    if sha256 not in (None, found):
        raise InputError(
            str(path), f"its SHA-256 is {found}, not {sha256}", "Get the file that is meant, or correct sets.*.sha256"
        )
    if rejects:
        raise InputError(f"{path}, line {rejects[0].line}", rejects[0].reason, "Correct the record")
    rows = [row for record in records for row in _pairs_of(path, record)]
    table = pd.DataFrame(rows, columns=["test_id", "query", "other", "same_answer", "kind"])
    keys = [(trivial_key(query), trivial_key(other)) for query, other in table[["query", "other"]].to_numpy()]
    labels = table["same_answer"].groupby([frozenset(pair) for pair in keys]).nunique()
    if (labels > 1).any():
        shown = " | ".join(sorted(labels.index[labels > 1][0]))[:160]
        raise InputError(str(path), f"a pair stands in it with both labels: {shown}", "Keep the right one")
    if len({*map(_form, records)}) > 1:
        raise InputError(str(path), "it holds pairs and triplets", "Give a file for each")
    if table["same_answer"].nunique() < 2:
        raise InputError(str(path), "all of its pairs have the same label", "Give pairs of both labels")
    table = table.assign(
        test_set=name,
        test_version=f"sha256:{found[:12]}",
        pair_id=[digest(f"{query}\n{other}") for query, other in table[["query", "other"]].to_numpy()],
        # The pairs of a triplet share their query, so they are in one group.
        group=connected_groups(keys),
    )
    once = table.drop_duplicates(["test_id", "pair_id"], ignore_index=True)
    if len(once) < len(table):
        logging.getLogger(__name__).info("%s: %d pairs stand in it twice", name, len(table) - len(once))
    return once[LABELLED.names]


def _form(record: Record) -> tuple[str, ...] | None:
    """Return the keys by which a record is a triplet or a pair, None if it is neither."""
    return next((keys for keys in (_TRIPLET, _PAIR) if {*keys} <= record.fields.keys()), None)


def _pairs_of(path: str | Path, record: Record) -> list[tuple[str, str, str, bool, str]]:
    """Return the pairs of a record: test_id, query, other, same_answer and kind of each."""
    where, fields = f"{path}, line {record.line}", record.fields
    form = _form(record)
    if form is None:
        raise InputError(
            where,
            f"neither a pair nor a triplet (found: {', '.join(map(str, fields))[:80]})",
            "Give the keys a, b and label, or anchor, positive and negative",
        )
    texts = [fields[name] for name in form if name != "label"]
    if not all(isinstance(text, str) and trivial_key(text) for text in texts):
        raise InputError(where, "one of its texts is missing", f"Give {len(texts)} texts")
    texts = [normalise(text) for text in texts]
    test_id = digest("\n".join(texts))
    if form == _PAIR:
        if fields["label"] not in (0, 1, "0", "1"):
            raise InputError(where, f"the label is {fields['label']!r}", "Give 0 or 1")
        return [(test_id, *texts, bool(int(fields["label"])), "")]
    kind = fields.get("kind") or ""
    if kind not in (*KINDS, ""):
        raise InputError(where, f"kind {kind!r} is none of {', '.join(KINDS)}", "Leave the key out, or correct it")
    anchor, positive, negative = texts
    return [(test_id, anchor, positive, True, kind), (test_id, anchor, negative, False, kind)]


def measure_models(
    pairs: pd.DataFrame, models: Mapping[str, "SentenceTransformer"], settings: Evaluate, seed: int, threads: int
) -> pd.DataFrame:
    """Measure models on labelled pairs.

    Parameters
    ----------
    pairs : pandas.DataFrame
        In the columns of :data:`cachelora.schemas.LABELLED`, of one set or several.
    models : mapping of str to SentenceTransformer
        By name, the base model first; changes are from it.
    settings : Evaluate
        Number of resamples, coverage, false-hit budget, batch size.
    seed : int
        Seed of the bootstrap.
    threads : int
        Threads that compute.

    Returns
    -------
    pandas.DataFrame
        ``model``, and what :func:`cachelora.evaluate.measure` gives.
    """
    scores = {name: score_pairs(model, pairs, settings.batch_tokens)[SCORES.names] for name, model in models.items()}
    base_scores = next(iter(scores.values()))
    return pd.DataFrame(
        [
            {"model": name, **result}
            for name, table in scores.items()
            for result in measure(table, base_scores, settings, seed, threads)
        ]
    )


def set_tables(
    table: pd.DataFrame, descriptions: Mapping[str, str | None], false_hit_budget: float
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Make a table for each set, to be read.

    Parameters
    ----------
    table : pandas.DataFrame
        What :func:`measure_models` gives, of one model or two.
    descriptions : mapping of str to (str or None)
        What is known of a set, by its name.
    false_hit_budget : float
        The budget of recall and hit ratio.

    Yields
    ------
    title : str
        The set, with the number of its triplets or pairs and of its groups, and its description.
    head : list of str
        The columns.
    rows : list of list of str
        A row a metric: the value of each model with its interval; of a second model the change too, * where its
        interval excludes zero.
    """
    models = list(table["model"].unique())
    head = ["metric", *models, *(["change"] if len(models) > 1 else [])]
    overall = table[table["kind"] == ALL_KINDS]
    for test_set, found in overall.groupby("test_set", sort=False):
        rows = []
        for metric, title in _SHOWN.items():
            measured = found[found["metric"] == metric]
            if measured.empty:
                continue
            cells = [_with_interval(row, "", ".3f") for _, row in measured.iterrows()]
            if len(models) > 1:
                last = measured.iloc[-1]
                star = "*" if last["change_low"] > 0 or last["change_high"] < 0 else ""
                cells.append(_with_interval(last, "change_", "+.3f") + star)
            rows.append([title.format(100 * false_hit_budget), *cells])
        # Only triplets have an accuracy.
        unit = "triplets" if (found["metric"] == "accuracy").any() else "pairs"
        first = found.iloc[0]
        known = f": {descriptions[test_set]}" if descriptions.get(test_set) else ""
        yield f"{test_set} ({first['n']} {unit}, {first['groups']} groups){known}", head, rows


def _with_interval(row: pd.Series, prefix: str, form: str) -> str:
    """Show a value with its interval, if it has one."""
    value, low, high = row["change" if prefix else "value"], row[f"{prefix}low"], row[f"{prefix}high"]
    return f"{value:{form}}" + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")


_WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".md": lambda table, path: table.astype(object).where(table.notna(), "").to_markdown(path, index=False),
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
}


def check_output(
    path: str | Path, names: Sequence[str], known: Mapping[str, LabelledSet], mirror: str | Path | None
) -> None:
    """Refuse, before the work, a file that :func:`write_measured` could not write or that would replace a set.

    Parameters
    ----------
    path : str or Path
        The file.
    names, known, mirror
        As for :func:`read_sets`.

    Raises
    ------
    InputError
        If its ending names no format, or it is the file of one of the sets.
    """
    if Path(path).suffix.lower() not in _WRITERS:
        raise InputError(str(path), "its ending names no format of a table", f"Use one of {', '.join(_WRITERS)}")
    for name in names:
        found = find_file(known[name].source if name in known else name, mirror)
        if found is not None and found.resolve() == Path(path).resolve():
            raise InputError(f"--output {path}", f"that is the set {name}", "Name another file")


def write_measured(path: str | Path, table: pd.DataFrame) -> None:
    """Write what was measured: every set, kind and metric.

    Parameters
    ----------
    path : str or Path
        A file whose ending names its format, ``.csv``, ``.md`` or ``.parquet``; see :func:`check_output`.
    table : pandas.DataFrame
        What :func:`measure_models` gives.
    """
    with replacing(path) as temporary:
        _WRITERS[Path(path).suffix.lower()](table, temporary)
