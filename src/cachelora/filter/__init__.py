"""Stage `filter`: everything that was written for a query, each text with the reasons for which it is dropped.

Negatives that rules make or that are mined from the domain's own queries join those of the LLM here, marked as such,
and pass through the same filters.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cachelora.config import Filter
from cachelora.filter.filters import FILTERS, Pair
from cachelora.filter.mined import mined_negatives
from cachelora.filter.nearest import Vectors, nearest_of_others
from cachelora.filter.reasons import COPY, DUPLICATE
from cachelora.filter.rule_made import rule_made_negatives
from cachelora.schemas import FILTERED, MINED, PARAPHRASE
from cachelora.text import trivial_key

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_log = logging.getLogger(__name__)


class _Text(NamedTuple):
    """A text that was written for a query."""

    query: int
    kind: str
    text: str
    source: str


def filter_texts(
    queries: pd.DataFrame, augmented: pd.DataFrame, settings: Filter, model: "SentenceTransformer", bfloat16: bool
) -> pd.DataFrame:
    """Gather what was written for the queries of a domain, and say of each text why it is dropped, if it is.

    Parameters
    ----------
    queries : pandas.DataFrame
        Queries of a domain, in the columns of :data:`cachelora.schemas.QUERIES`; texts are judged beside the canonical
        ones.
    augmented : pandas.DataFrame
        Their paraphrases and negatives, in the columns of :data:`cachelora.schemas.AUGMENTED`.
    settings : Filter
        Thresholds and sources.
    model : SentenceTransformer
        The base model that measures similarities.
    bfloat16 : bool
        Whether to compute in bfloat16.

    Returns
    -------
    pandas.DataFrame
        In the columns of :data:`cachelora.schemas.FILTERED`, in the order of the queries, paraphrases first.
    """
    canonical = queries[queries["canonical"]]
    asked = canonical["query"].tolist()
    place = {query_id: number for number, query_id in enumerate(canonical["query_id"])}
    written = [
        _Text(place[row.query_id], row.kind, row.text, "llm") for row in augmented.itertuples() if row.query_id in place
    ]
    _log.info("%d queries, %d texts: encoding", len(asked), len(written))
    vectors = Vectors(model, bfloat16)
    vectors.add([*asked, *(row.text for row in written)])

    paraphrases = [row for row in written if row.kind == PARAPHRASE]
    judged = [*_judge_paraphrases(asked, paraphrases, settings, vectors)]
    kept: dict[int, dict[str, float]] = defaultdict(dict)
    for row, similarity, reasons in judged:
        if not reasons:
            kept[row.query][row.text] = similarity

    negatives = [row for row in written if row.kind != PARAPHRASE]
    # A test set made of what is held out holds the LLM's negatives alone.
    splits = canonical["split"].tolist()
    if settings.rule_made:
        negatives += [
            _Text(number, kind, text, "rule")
            for number, query in enumerate(asked)
            if splits[number] != "test"
            for kind, text in rule_made_negatives(query)[: settings.rule_made]
        ]
    if settings.mined:
        # In each split apart: a query of the other would cross over.
        for split in ("train", "validation"):
            number_of = {query: number for number, query in enumerate(asked) if splits[number] == split}
            positives = {query: next(iter(kept[number])) for query, number in number_of.items() if number in kept}
            mined = mined_negatives(model, positives, settings.mined, settings.mined_share)
            negatives += [
                _Text(number_of[query], MINED, text, "mined") for query, texts in mined.items() for text in texts
            ]
    vectors.add([row.text for row in negatives])
    _log.info("judging %d paraphrases and %d negatives", len(paraphrases), len(negatives))
    judged += _judge_negatives(asked, negatives, kept, settings, vectors)

    judged.sort(key=lambda found: (found[0].query, found[0].kind != PARAPHRASE))
    ids = canonical["query_id"].tolist()
    return pd.DataFrame(
        [(ids[row.query], row.kind, row.text, row.source, similarity, reasons) for row, similarity, reasons in judged],
        columns=FILTERED.names,
    )


def _judge_paraphrases(
    asked: list[str], rows: list[_Text], settings: Filter, vectors: Vectors
) -> Iterator[tuple[_Text, float, list[str]]]:
    """Judge paraphrases beside their queries."""
    thresholds = settings.filters.thresholds
    similarities = vectors.similarities([asked[row.query] for row in rows], [row.text for row in rows])
    seen: set[tuple[int, str]] = set()
    for row, similarity in zip(rows, similarities.tolist(), strict=True):
        pair = Pair(asked[row.query], row.text, similarity)
        yield row, similarity, [*_repeats(row, pair.query, seen), *_reasons(pair, PARAPHRASE, thresholds)]


def _judge_negatives(
    asked: list[str], rows: list[_Text], paraphrases: dict[int, dict[str, float]], settings: Filter, vectors: Vectors
) -> Iterator[tuple[_Text, float, list[str]]]:
    """Judge negatives beside their queries, the paraphrases that were kept, and the other queries with theirs."""
    thresholds = settings.filters.thresholds
    texts = [row.text for row in rows]
    similarities = vectors.similarities([asked[row.query] for row in rows], texts)
    elsewhere = np.full(len(rows), -1.0)
    if "elsewhere" in thresholds:
        pool = [*enumerate(asked), *((number, text) for number, kept in paraphrases.items() for text in kept)]
        most = 1 + max((len(kept) for kept in paraphrases.values()), default=0)
        elsewhere = nearest_of_others(
            vectors.of(texts),
            np.asarray([row.query for row in rows], dtype=np.int64),
            vectors.of([text for _, text in pool]),
            np.asarray([number for number, _ in pool], dtype=np.int64),
            most + 1,
        )
    # A text that is both is a paraphrase whose negative cannot be trusted.
    seen = {(number, trivial_key(text)) for number, kept in paraphrases.items() for text in kept}
    for row, similarity, nearest in zip(rows, similarities.tolist(), elsewhere.tolist(), strict=True):
        query, kept = asked[row.query], paraphrases.get(row.query, {})
        pair = Pair(
            query,
            row.text,
            similarity,
            tuple(kept),
            tuple(vectors.similarities([row.text] * len(kept), [*kept]).tolist()),
            tuple(kept.values()),
            # What is mined is another query of the domain.
            -1.0 if row.source == "mined" else nearest,
        )
        yield row, similarity, [*_repeats(row, query, seen), *_reasons(pair, "negative", thresholds)]


def _repeats(row: _Text, query: str, seen: set[tuple[int, str]]) -> list[str]:
    """Say whether a text has the words of its query or of one above, and remember it."""
    key = trivial_key(row.text)
    if key == trivial_key(query):
        return [COPY]
    if (row.query, key) in seen:
        return [DUPLICATE]
    seen.add((row.query, key))
    return []


def _reasons(pair: Pair, role: str, thresholds: dict[str, float]) -> list[str]:
    """List the filters that drop a text."""
    return [
        name
        for name, filter_ in FILTERS.items()
        if filter_.of in ("text", role) and name in thresholds and filter_.drops(pair, thresholds[name])
    ]
