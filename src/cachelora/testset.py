"""Stage `testset`: held-out triplets, from a file or from the test split of a domain without one.

Test sets that a project means to keep are frozen: a lock file holds version and SHA-256 of each, and a set that differs
from it is refused.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cachelora.errors import InputError
from cachelora.files import Reject, check_reject_share, read_records, sha256_of
from cachelora.schemas import KINDS, PAIRS, PARAPHRASE, TESTSET
from cachelora.text import connected_groups, digest, near_copies, normalise, trivial_key

if TYPE_CHECKING:
    from cachelora.triplets import Group

TEXTS = ("anchor", "positive", "negative")


class Frozen(BaseModel):
    """What the lock says of one test set.

    Attributes
    ----------
    version : int
        Raised whenever its content changes.
    sha256 : str
        Of the file.
    """

    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def read_lock(path: str | Path) -> dict[str, Frozen]:
    """Read the lock of the frozen test sets.

    Parameters
    ----------
    path : str or Path
        JSON: an object for each test file, by its path.

    Returns
    -------
    dict of str to Frozen
        By path.

    Raises
    ------
    InputError
        If it is missing or not of that form.
    """
    try:
        return TypeAdapter(dict[str, Frozen]).validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        first = "no such file" if isinstance(error, FileNotFoundError) else "it is no lock of test sets"
        raise InputError(str(path), first, "Restore it; without one to restore, remove `testset.lock`") from error


def lock_key(path: str | Path) -> str:
    """Return the name under which the lock knows a test file, however its path is written.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    str
        Its path relative to the working directory, with slashes.
    """
    return Path(os.path.relpath(path)).as_posix()


def frozen_version(path: str | Path, frozen: Frozen | None) -> str:
    """Return the version of a test file, and refuse one that is not what was frozen.

    Parameters
    ----------
    path : str or Path
        The file.
    frozen : Frozen or None
        What the lock says of it; None if it is not in the lock.

    Returns
    -------
    str
        ``v1``, ``v2`` ... of a frozen file; of any other the beginning of its SHA-256.

    Raises
    ------
    InputError
        If the file is not the one that was frozen.
    """
    found = sha256_of(path)
    if frozen is None:
        return f"sha256:{found[:12]}"
    if found != frozen.sha256:
        raise InputError(
            str(path),
            f"it is not the version {frozen.version} that was frozen (its SHA-256 is {found})",
            "Restore it, or freeze the change as the next version: cachelora data-check --freeze",
        )
    return f"v{frozen.version}"


def read_testset(path: str | Path, max_reject_share: float, version: str) -> tuple[pd.DataFrame, list[Reject]]:
    """Read a file of held-out triplets.

    Parameters
    ----------
    path : str or Path
        JSON lines with ``anchor``, ``positive``, ``negative`` and ``kind``.
    max_reject_share : float
        Largest share of bad records, in [0, 1].
    version : str
        The version of the test set, as :func:`frozen_version` gives it.

    Returns
    -------
    table : pandas.DataFrame
        The rows, in the columns of :data:`cachelora.schemas.TESTSET`. Triplets that share a text, directly or through
        others, share a group.
    rejects : list of Reject
        What was set aside, by line.

    Raises
    ------
    InputError
        If the file is missing or empty, or the share of bad records is above the limit.
    """
    records, rejects = read_records(path)
    rows: dict[str, tuple[str, ...]] = {}
    labels: dict[frozenset[str], bool] = {}
    for record in records:
        values = {name: record.fields.get(name) for name in TEXTS}
        texts = {name: normalise(value) if isinstance(value, str) else "" for name, value in values.items()}
        kind = record.fields.get("kind")
        test_id = digest("\n".join(texts.values()))
        keys = {name: trivial_key(text) for name, text in texts.items()}
        missing = [name for name in TEXTS if not keys[name]]
        pairs = {frozenset((keys["anchor"], keys[name])): name == "positive" for name in ("positive", "negative")}
        if missing:
            reason = f"no text under '{missing[0]}'"
        elif kind not in KINDS:
            reason = f"kind {kind!r} is none of {', '.join(KINDS)}"
        elif len(set(keys.values())) < len(TEXTS):
            reason = "two of its three texts are the same"
        elif test_id in rows:
            reason = "the same triplet stands above"
        elif any(labels.get(pair, same) != same for pair, same in pairs.items()):
            reason = "one of its pairs has the other label above"
        else:
            labels |= pairs
            rows[test_id] = (test_id, *texts.values(), kind)
            continue
        rejects.append(Reject(record.line, reason, str(record.fields)[:200]))
    rejects.sort(key=lambda reject: reject.line)
    check_reject_share(path, len(rows), rejects, max_reject_share, "queries.max_reject_share")
    table = pd.DataFrame(list(rows.values()), columns=["test_id", *TEXTS, "kind"])
    return table.assign(group=_groups(table), test_version=version)[TESTSET.names], rejects


def _groups(table: pd.DataFrame) -> list[str]:
    """Group triplets that share a text."""
    return connected_groups([[trivial_key(row[name]) for name in TEXTS] for row in table.to_dict("records")])


def testset_from_groups(groups: "list[Group]", where: str) -> pd.DataFrame:
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
        :data:`cachelora.schemas.TESTSET`. The version is a digest of the triplets.

    Raises
    ------
    InputError
        If there is no group.
    """
    rows = []
    for group in groups:
        for number, (kind, negative, _) in enumerate(group.negatives):
            positive = group.paraphrases[number % len(group.paraphrases)]
            test_id = digest("\n".join((group.query, positive, negative)))
            rows.append((test_id, group.query, positive, negative, kind))
    if not rows:
        raise InputError(where, "no triplet is left in the test split", "Give more queries, or a test file")
    table = pd.DataFrame(rows, columns=["test_id", *TEXTS, "kind"])
    version = f"held out:{digest(' '.join(sorted(table['test_id'])))[:12]}"
    return table.assign(group=_groups(table), test_version=version)[TESTSET.names]


def drop_trained_on(
    table: pd.DataFrame, trained_on: Mapping[str, pd.DataFrame], threshold: float, where: str
) -> tuple[pd.DataFrame, list[Reject]]:
    """Drop the test triplets of which finished models were trained on a text, or nearly.

    That is for a domain that comes later: the groups of the others, which the models were trained on, stay as they are.

    Parameters
    ----------
    table : pandas.DataFrame
        Test triplets, in the columns of :data:`cachelora.schemas.TESTSET`.
    trained_on : mapping of str to pandas.DataFrame
        The other domains' triplets, in the columns of :data:`cachelora.schemas.TRIPLETS`, by domain.
    threshold : float
        Least similarity of a near copy (see :func:`cachelora.text.near_copies`).
    where : str
        What the test set was made of, for the message.

    Returns
    -------
    kept : pandas.DataFrame
        The others. If any was dropped, the version says how many.
    rejects : list of Reject
        The dropped ones, with the domain.

    Raises
    ------
    InputError
        If none is left.
    """
    owners: dict[str, str] = {}
    for domain, triplets in trained_on.items():
        for row in triplets.itertuples():
            for text in (row.anchor, row.positive, *(negative["text"] for negative in row.negatives)):
                owners.setdefault(text, domain)
    texts, references = [text for name in TEXTS for text in table[name]], [*owners]
    found: dict[int, str] = {}
    for number, reference, _ in near_copies(texts, references, threshold):
        found.setdefault(number % len(table), owners[references[reference]])
    rejects = [
        Reject(0, f"a training group of {domain} holds a text of it, or nearly", str(list(table.iloc[row][[*TEXTS]])))
        for row, domain in sorted(found.items())
    ]
    if len(found) == len(table):
        raise InputError(where, "the other domains were trained on a text of every triplet", "Give other test triplets")
    if not found:
        return table, rejects
    kept = table.drop(index=table.index[list(found)])
    return kept.assign(group=_groups(kept), test_version=kept["test_version"] + f" less {len(found)}"), rejects


def make_pairs(triplets: pd.DataFrame, calibration_share: float, seed: int) -> pd.DataFrame:
    """Make labelled pairs of a test set, for choosing a threshold and for testing it.

    The groups are ordered by a hash of seed and group; the first go into the calibration part. No text stands in both.
    Each part gets a group at least; a single group goes into the test part.

    Parameters
    ----------
    triplets : pandas.DataFrame
        In the columns of :data:`cachelora.schemas.TESTSET`.
    calibration_share : float
        Share of the groups in the calibration part, in (0, 1).
    seed : int
        Seed of the draw.

    Returns
    -------
    pandas.DataFrame
        The distinct pairs, in the columns of :data:`cachelora.schemas.PAIRS`.
    """
    ordered = sorted(triplets["group"].unique(), key=lambda group: digest(f"{seed} {group}"))
    calibration = set(ordered[: min(math.ceil(calibration_share * len(ordered)), len(ordered) - 1)])
    rows = {}
    for row in triplets.itertuples():
        part = "calibration" if row.group in calibration else "test"
        for other, kind in ((row.positive, PARAPHRASE), (row.negative, row.kind)):
            pair_id = digest(f"{row.anchor}\n{other}")
            rows.setdefault(pair_id, (pair_id, row.anchor, other, kind == PARAPHRASE, kind, row.group, part))
    return pd.DataFrame(list(rows.values()), columns=PAIRS.names)
