"""Negatives mined from the domain's own queries: the nearest that are not too near."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BATCH_SIZE = 128


def mined_negatives(
    model: "SentenceTransformer", positives: Mapping[str, str], most: int, positive_share: float
) -> dict[str, list[str]]:
    """Mine hard negatives by sentence-transformers, the hard-negative miner of seed document 003.

    Parameters
    ----------
    model : SentenceTransformer
        The base model.
    positives : mapping of str to str
        A paraphrase for each canonical query of the domain.
    most : int
        So many for a query at most.
    positive_share : float
        A negative's similarity is at most this share of the positive's: TopK-PercPos of NV-Retriever
        (arXiv:2407.15831).

    Returns
    -------
    dict of str to list of str
        By query; the other queries, the nearest first. A query without any is not in it.
    """
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    if len(positives) < 2:
        return {}
    # The nearest of all is the query itself; the miner leaves out the anchor's own positives, and so the pairs are
    # turned around: a query's negatives are those of its paraphrase.
    rows = mine_hard_negatives(
        Dataset.from_dict({"anchor": [*positives.values()], "positive": [*positives]}),
        model,
        relative_margin=1 - positive_share,
        num_negatives=most,
        sampling_strategy="top",
        output_format="triplet",
        batch_size=_BATCH_SIZE,
        use_faiss=True,
        verbose=False,
    )
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["positive"], []).append(row["negative"])
    return found
