"""Stage `triplets`: groups of equivalent texts with their hard negatives, of what the filters and the judge have kept.

Grouping follows seed document 003 ("Convert to triplet format"): the canonical query and its paraphrases are
equivalent to one another, and every negative of the query is a negative of all of them.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cachelora.errors import InputError
from cachelora.filter.reasons import BY_SIMILARITY
from cachelora.schemas import PARAPHRASE, TRIPLETS, role_of
from cachelora.text import near_copies

JUDGE = "judge"
"""The reason of a text that the judge is against."""


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
    negatives : list of (str, str, str)
        Kind, text and source of each hard negative, at least one.
    """

    group: str
    split: str
    query: str
    paraphrases: list[str]
    negatives: list[tuple[str, str, str]]

    @property
    def texts(self) -> list[str]:
        """All texts of the group, negatives last."""
        return [self.query, *self.paraphrases, *(text for _, text, _ in self.negatives)]


def kept_texts(filtered: pd.DataFrame, verdicts: pd.DataFrame | None) -> pd.DataFrame:
    """Say of each text why it is dropped, the judge's verdict included.

    Parameters
    ----------
    filtered : pandas.DataFrame
        What was written for the queries, in the columns of :data:`cachelora.schemas.FILTERED`.
    verdicts : pandas.DataFrame or None
        What a judge says, in the columns of :data:`cachelora.schemas.VERDICTS`; None without one.

    Returns
    -------
    pandas.DataFrame
        The texts with one more reason where a paraphrase needs another answer, or a negative the same; one on which
        the judge said nothing stays.
    """
    if verdicts is None:
        return filtered
    said = dict(zip(zip(verdicts["query_id"], verdicts["text"], strict=True), verdicts["verdict"], strict=True))
    against = {PARAPHRASE: "different"}
    reasons = [
        [*row.reasons, JUDGE] if said.get((row.query_id, row.text)) == against.get(row.kind, "same") else row.reasons
        for row in filtered.itertuples()
    ]
    return filtered.assign(reasons=reasons)


def by_words_alone(texts: pd.DataFrame) -> pd.DataFrame:
    """Take back what the filters dropped for a similarity.

    A test set must not lack what the base model gets wrong, nor change with it.

    Parameters
    ----------
    texts : pandas.DataFrame
        In the columns of :data:`cachelora.schemas.FILTERED`.

    Returns
    -------
    pandas.DataFrame
        The texts with the reasons that their words alone give.
    """
    return texts.assign(reasons=[[name for name in found if name not in BY_SIMILARITY] for found in texts["reasons"]])


def text_reasons(texts: pd.DataFrame) -> Counter[str]:
    """Count why texts were dropped.

    Parameters
    ----------
    texts : pandas.DataFrame
        As :func:`kept_texts` gives them.

    Returns
    -------
    Counter
        By role and reason.
    """
    rows = zip(texts["kind"], texts["reasons"], strict=True)
    return Counter(f"{role_of(kind)}: {name}" for kind, found in rows for name in found)


def make_groups(queries: pd.DataFrame, texts: pd.DataFrame) -> tuple[list[Group], Counter[str]]:
    """Group what was kept for each query.

    Parameters
    ----------
    queries : pandas.DataFrame
        Queries of one domain, in the columns of :data:`cachelora.schemas.QUERIES`.
    texts : pandas.DataFrame
        Their paraphrases and negatives, as :func:`kept_texts` gives them.

    Returns
    -------
    groups : list of Group
        In the order of the queries.
    dropped : Counter
        How many queries and groups were dropped, by reason.
    """
    kept = texts[texts["reasons"].map(len) == 0]
    written = {query_id: rows for query_id, rows in kept.groupby("query_id", sort=False)}
    groups, dropped = [], Counter()
    canonical = queries[queries["canonical"]]
    dropped["query: another spelling of a query above"] = len(queries) - len(canonical)
    for row in canonical.itertuples():
        rows = written.get(row.query_id, kept.iloc[:0])
        paraphrases = rows.loc[rows["kind"] == PARAPHRASE, "text"].tolist()
        negatives = [
            (item.kind, item.text, item.source) for item in rows[rows["kind"] != PARAPHRASE].itertuples(index=False)
        ]
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
    """Drop the groups that hold a test text, or nearly; of a negative that was made or mined, only that negative.

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
        How many groups and negatives were dropped, by reason.
    """
    tested = sorted({text for table in testsets for name in ("anchor", "positive", "negative") for text in table[name]})
    texts = sorted({text for group in groups for text in group.texts})
    leaking = {texts[number] for number, _, _ in near_copies(texts, tested, threshold)}
    kept: list[Group] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        # What was not written for the query says nothing about the group.
        added = [text for _, text, source in group.negatives if source != "llm"]
        negatives = [item for item in group.negatives if item[2] == "llm" or item[1] not in leaking]
        if not negatives or leaking & ({*group.texts} - {*added}):
            dropped["group: holds a test text or a near copy of one"] += 1
        else:
            kept.append(dataclasses.replace(group, negatives=negatives))
            dropped["negative, rule-made or mined: a test text or a near copy of one"] += len(group.negatives) - len(
                negatives
            )
    return kept, +dropped


def make_triplets(groups: list[Group], grouping: str, dropped: Counter[str], where: str) -> pd.DataFrame:
    """Make the rows that training and validation read.

    Parameters
    ----------
    groups : list of Group
        Groups for training and validation.
    grouping : str
        ``group`` for a row for each paraphrase, with all negatives of the group. ``product`` for a row for each
        paraphrase and each negative, the rows of seed document 003 ("Convert to triplet format").
    dropped : Counter
        What was dropped before, by reason, for the message.
    where : str
        The file that the domain's queries came from, for the message.

    Returns
    -------
    pandas.DataFrame
        The paraphrase as anchor, the canonical query as positive (as in seed 003), and negatives; in the columns of
        :data:`cachelora.schemas.TRIPLETS`.

    Raises
    ------
    InputError
        If nothing is left to train on, or nothing to validate on.
    """
    rows = []
    for group in groups:
        negatives = [{"kind": kind, "text": text, "source": source} for kind, text, source in group.negatives]
        together = [negatives] if grouping == "group" else [[negative] for negative in negatives]
        rows += [
            (paraphrase, group.query, part, group.group, group.split)
            for paraphrase in group.paraphrases
            for part in together
        ]
    table = pd.DataFrame(rows, columns=TRIPLETS.names)
    for split in ("train", "validation"):
        if not (table["split"] == split).any():
            reasons = ", ".join(f"{reason} ({number})" for reason, number in dropped.most_common(3)) or "nothing"
            raise InputError(
                where,
                f"no group is left in the {split} split; dropped: {reasons}",
                "Give more queries, use a better LLM, or see `filter` and `judge` in the config",
            )
    return table
