"""Stage `queries`: a log of unlabelled queries, cleaned, grouped and split."""

import math
from pathlib import Path

import pandas as pd

from cachelora.config import Queries
from cachelora.errors import InputError
from cachelora.files import Reject, check_reject_share, read_records
from cachelora.text import digest, normalise, trivial_key


def read_queries(path: str | Path, settings: Queries) -> tuple[list[str], list[Reject]]:
    """Read the queries of a log.

    Parameters
    ----------
    path : str or Path
        A file that :func:`cachelora.files.read_records` reads, with the query under the key ``query``.
    settings : Queries
        Limits: ``max_chars`` and ``max_reject_share``.

    Returns
    -------
    queries : list of str
        Normalised, in the file's order, repetitions included.
    rejects : list of Reject
        What was set aside, by line.

    Raises
    ------
    InputError
        If the file is missing or empty, or the share of bad records is above the limit.
    """
    records, rejects = read_records(path)
    queries = []
    for record in records:
        value = record.fields.get("query")
        if "query" not in record.fields:
            reason = f"no key 'query' (found: {(', '.join(map(str, record.fields)) or 'none')[:80]})"
        elif not isinstance(value, str):
            reason = f"'query' is {type(value).__name__}, not text"
        elif len(value) > settings.max_chars:
            reason = f"'query' has {len(value)} characters, more than queries.max_chars = {settings.max_chars}"
        elif not trivial_key(query := normalise(value)):
            reason = "'query' holds no word"
        else:
            queries.append(query)
            continue
        rejects.append(Reject(record.line, reason, str(value)[:200]))
    rejects.sort(key=lambda reject: reject.line)
    check_reject_share(path, len(queries), rejects, settings.max_reject_share, "queries.max_reject_share")
    return queries, rejects


def group_queries(queries: list[str]) -> pd.DataFrame:
    """Group the spellings of one query.

    Parameters
    ----------
    queries : list of str
        Normalised queries, repetitions included.

    Returns
    -------
    pandas.DataFrame
        A row a distinct spelling, in order of first appearance: query_id, query, group, canonical, count.
    """
    counts = pd.Series(queries).value_counts(sort=False)
    table = pd.DataFrame({"query": counts.index, "count": counts.to_numpy()})
    table["query_id"] = table["query"].map(digest)
    table["group"] = table["query"].map(lambda query: digest(trivial_key(query)))
    table["canonical"] = ~table["group"].duplicated()
    return table


def split_groups(table: pd.DataFrame, settings: Queries, seed: int, hold_out_test: bool, where: str) -> pd.DataFrame:
    """Draw the splits, by group.

    The groups are ordered by a hash of seed and group, so that a query more in the log moves few others between the
    splits.

    Parameters
    ----------
    table : pandas.DataFrame
        What :func:`group_queries` gives.
    settings : Queries
        ``max_queries``, ``validation_share``, ``test_share`` and ``train_share``.
    seed : int
        Seed of the draw.
    hold_out_test : bool
        Whether a test split is drawn too, for a domain without a test file.
    where : str
        The file that the queries came from, for the message.

    Returns
    -------
    pandas.DataFrame
        The table with a column ``split``, without the groups above ``max_queries`` and ``train_share``.

    Raises
    ------
    InputError
        If there are too few groups for each split to get one.
    """
    ordered = sorted(table["group"].unique(), key=lambda group: digest(f"{seed} {group}"))
    ordered = ordered[: settings.max_queries]
    validation = math.ceil(settings.validation_share * len(ordered))
    test = math.ceil(settings.test_share * len(ordered)) if hold_out_test else 0
    if validation + test >= len(ordered):
        raise InputError(
            where,
            f"{len(ordered)} distinct queries are too few to split"
            + (f" (queries.max_queries = {settings.max_queries})" if settings.max_queries else ""),
            "Give more, or lower the shares under `queries`",
        )
    # The share is cut from the training groups only, so that every share is chosen and tested on the same groups.
    train = math.ceil(settings.train_share * (len(ordered) - validation - test))
    splits = ["validation"] * validation + ["test"] * test + ["train"] * train
    table = table.assign(split=table["group"].map(dict(zip(ordered, splits, strict=False))))
    return table[table["split"].notna()].reset_index(drop=True)
