"""Stage `testset`: held-out triplets, from a file or from the test split of a domain without one."""

from pathlib import Path

import pandas as pd

from cachelora.errors import InputError
from cachelora.files import Reject, check_reject_share, read_records
from cachelora.schemas import KINDS, TESTSET
from cachelora.text import digest, normalise, trivial_key
from cachelora.triplets import Group

TEXTS = ("anchor", "positive", "negative")


def read_testset(path: str | Path, max_reject_share: float) -> tuple[pd.DataFrame, list[Reject]]:
    """Read a file of held-out triplets.

    Parameters
    ----------
    path : str or Path
        JSON lines with ``anchor``, ``positive``, ``negative`` and ``kind``.
    max_reject_share : float
        Largest share of bad records, in [0, 1].

    Returns
    -------
    table : pandas.DataFrame
        The rows, in the columns of :data:`cachelora.schemas.TESTSET`. Triplets with the same anchor share a group.
    rejects : list of Reject
        What was set aside, by line.

    Raises
    ------
    InputError
        If the file is missing or empty, or the share of bad records is above the limit.
    """
    records, rejects = read_records(path)
    rows: dict[str, tuple[str, ...]] = {}
    for record in records:
        values = {name: record.fields.get(name) for name in TEXTS}
        texts = {name: normalise(value) if isinstance(value, str) else "" for name, value in values.items()}
        kind = record.fields.get("kind")
        test_id = digest("\n".join(texts.values()))
        missing = [name for name in TEXTS if not trivial_key(texts[name])]
        if missing:
            reason = f"no text under '{missing[0]}'"
        elif kind not in KINDS:
            reason = f"kind {kind!r} is none of {', '.join(KINDS)}"
        elif len({trivial_key(text) for text in texts.values()}) < len(TEXTS):
            reason = "two of its three texts are the same"
        elif test_id in rows:
            reason = "the same triplet stands above"
        else:
            rows[test_id] = (test_id, *texts.values(), kind, digest(trivial_key(texts["anchor"])))
            continue
        rejects.append(Reject(record.line, reason, str(record.fields)[:200]))
    rejects.sort(key=lambda reject: reject.line)
    check_reject_share(path, len(rows), rejects, max_reject_share, "queries.max_reject_share")
    return pd.DataFrame(list(rows.values()), columns=TESTSET.names), rejects


def testset_from_groups(groups: list[Group], where: str) -> pd.DataFrame:
    """Make a test set of the groups that were held out for it.

    Parameters
    ----------
    groups : list of Group
        Groups of the test split.
    where : str
        The file that the domain's queries came from, for the message.

    Returns
    -------
    pandas.DataFrame
        A row for each negative, the paraphrases of its group in turn, in the columns of
        :data:`cachelora.schemas.TESTSET`.

    Raises
    ------
    InputError
        If there is no group.
    """
    rows = []
    for group in groups:
        for number, (kind, negative) in enumerate(group.negatives):
            positive = group.paraphrases[number % len(group.paraphrases)]
            test_id = digest("\n".join((group.query, positive, negative)))
            rows.append((test_id, group.query, positive, negative, kind, group.group))
    if not rows:
        raise InputError(where, "no triplet is left in the test split", "Give more queries, or a test file")
    return pd.DataFrame(rows, columns=TESTSET.names)
