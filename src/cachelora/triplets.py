"""Stage `triplets`: groups of equivalent texts with their hard negatives, and a count of everything that was dropped.

Grouping follows seed document 003 ("Convert to triplet format"): the canonical query and its paraphrases are
equivalent to one another, and every negative of the query is a negative of all of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cachelora.errors import InputError
from cachelora.schemas import KINDS, PARAPHRASE, TRIPLETS
from cachelora.text import near_copies, trivial_key


@dataclass(frozen=True)
class Group:
    """A canonical query with what was written for it.

    Attributes
    ----------
    group : str
        Digest of the group.
    split : str
        The split that the whole group is in.
    query : str
        The canonical query.
    paraphrases : list of str
        Texts equivalent to it, at least one.
    negatives : list of (str, str)
        Kind and text of each hard negative, at least one.
    """

    group: str
    split: str
    query: str
    paraphrases: list[str]
    negatives: list[tuple[str, str]]

    @property
    def texts(self) -> list[str]:
        """All texts of the group, negatives last."""
        return [self.query, *self.paraphrases, *(text for _, text in self.negatives)]


def make_groups(queries: pd.DataFrame, augmented: pd.DataFrame) -> tuple[list[Group], Counter[str]]:
    """Group what was written for each query, and drop what cannot be used.

    Parameters
    ----------
    queries : pandas.DataFrame
        Queries of one domain, in the columns of :data:`cachelora.schemas.QUERIES`.
    augmented : pandas.DataFrame
        Their paraphrases and negatives, in the columns of :data:`cachelora.schemas.AUGMENTED`.

    Returns
    -------
    groups : list of Group
        In the order of the queries.
    dropped : Counter
        How many texts and groups were dropped, by reason.
    """
    written = {query_id: rows for query_id, rows in augmented.groupby("query_id", sort=False)}
    groups, dropped = [], Counter()
    canonical = queries[queries["canonical"]]
    dropped["query: another spelling of a query above"] = len(queries) - len(canonical)
    for row in canonical.itertuples():
        paraphrases, negatives = [], []
        seen = {trivial_key(row.query): "the query"}
        # Paraphrases first: a text that is both is a paraphrase whose negative cannot be trusted.
        rows = written.get(row.query_id, augmented.iloc[:0])
        for item in sorted(rows.itertuples(), key=lambda item: item.kind != PARAPHRASE):
            role = PARAPHRASE if item.kind == PARAPHRASE else "negative"
            key = trivial_key(item.text)
            if key in seen:
                dropped[f"{role}: same words as {seen[key]}"] += 1
                continue
            seen[key] = f"another {role}" if role == PARAPHRASE else "another negative"
            if role == PARAPHRASE:
                paraphrases.append(item.text)
            else:
                negatives.append((item.kind, item.text))
        if not paraphrases:
            dropped["group: no paraphrase"] += 1
        elif not negatives:
            dropped["group: no negative"] += 1
        else:
            groups.append(Group(row.group, row.split, row.query, paraphrases, negatives))
    return groups, +dropped


def drop_test_copies(
    groups: list[Group], testsets: Sequence[pd.DataFrame], threshold: float
) -> tuple[list[Group], Counter[str]]:
    """Drop the groups that hold a test text, or nearly.

    Parameters
    ----------
    groups : list of Group
        Groups for training and validation.
    testsets : sequence of pandas.DataFrame
        The test sets of all domains, in the columns of :data:`cachelora.schemas.TESTSET`.
    threshold : float
        Least similarity of a near copy (see :func:`cachelora.text.near_copies`).

    Returns
    -------
    kept : list of Group
        The groups without a test text.
    dropped : Counter
        How many groups were dropped.
    """
    tested = sorted({text for table in testsets for name in ("anchor", "positive", "negative") for text in table[name]})
    owners = [number for number, group in enumerate(groups) for _ in group.texts]
    texts = [text for group in groups for text in group.texts]
    leaking = {owners[number] for number, _, _ in near_copies(texts, tested, threshold)}
    kept = [group for number, group in enumerate(groups) if number not in leaking]
    return kept, +Counter({"group: holds a test text or a near copy of one": len(leaking)})


def make_triplets(groups: list[Group], dropped: Counter[str], where: str) -> pd.DataFrame:
    """Make the rows that training and validation read.

    Parameters
    ----------
    groups : list of Group
        Groups for training and validation.
    dropped : Counter
        What was dropped before, by reason, for the message.
    where : str
        The file that the domain's queries came from, for the message.

    Returns
    -------
    pandas.DataFrame
        A row for each paraphrase: the paraphrase as anchor, the canonical query as positive (as in seed 003), all
        negatives of the group; in the columns of :data:`cachelora.schemas.TRIPLETS`.

    Raises
    ------
    InputError
        If nothing is left to train on, or nothing to validate on.
    """
    rows = [
        (
            paraphrase,
            group.query,
            [{"kind": kind, "text": text} for kind, text in group.negatives],
            group.group,
            group.split,
        )
        for group in groups
        for paraphrase in group.paraphrases
    ]
    table = pd.DataFrame(rows, columns=TRIPLETS.names)
    for split in ("train", "validation"):
        if not (table["split"] == split).any():
            reasons = ", ".join(f"{reason} ({number})" for reason, number in dropped.most_common(3)) or "nothing"
            raise InputError(
                where,
                f"no group is left in the {split} split; dropped: {reasons}",
                "Give more queries, or a better LLM",
            )
    return table


def data_card(
    domain: str, queries: pd.DataFrame, augmented: pd.DataFrame, triplets: pd.DataFrame, dropped: Counter[str]
) -> str:
    """Describe a domain's triplets: how many there are, of which kinds, and what was dropped and why.

    Parameters
    ----------
    domain : str
        The domain.
    queries, augmented, triplets : pandas.DataFrame
        The tables of the stages, in the columns of :mod:`cachelora.schemas`.
    dropped : Counter
        Numbers by reason.

    Returns
    -------
    str
        Markdown. It holds no text of a query.
    """
    groups = triplets.drop_duplicates("group")
    kinds = Counter(negative["kind"] for negatives in groups["negatives"] for negative in negatives)
    for_test = queries["split"] == "test"
    augmented = augmented[~augmented["query_id"].isin(queries.loc[for_test, "query_id"])]
    held_out, queries = queries[for_test], queries[~for_test]
    counts = {
        "groups held out for the test": held_out["group"].nunique(),
        "queries used": queries["count"].sum(),
        "distinct spellings": len(queries),
        "groups": queries["group"].nunique(),
        "paraphrases written": (augmented["kind"] == PARAPHRASE).sum(),
        "negatives written": (augmented["kind"] != PARAPHRASE).sum(),
        "groups kept for training": (groups["split"] == "train").sum(),
        "groups kept for validation": (groups["split"] == "validation").sum(),
        "triplet rows for training": (triplets["split"] == "train").sum(),
        "triplet rows for validation": (triplets["split"] == "validation").sum(),
    }
    sections = [
        (f"# Triplets of {domain}", counts),
        ("## Negatives kept, by kind", {kind: kinds[kind] for kind in KINDS}),
        ("## Dropped, by reason", dict(sorted(dropped.items())) or {"nothing": 0}),
    ]
    return "\n\n".join(
        f"{title}\n\n" + "\n".join(f"* {name}: {n}" for name, n in rows.items()) for title, rows in sections
    )
