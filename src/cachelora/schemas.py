"""The contracts between the stages: the columns of every Parquet file, each with its meaning."""

from typing import Literal, get_args

import pyarrow as pa

LookAlikeKind = Literal["aspect", "entity", "polarity", "quantity", "scope"]
"""The kinds whose negatives stay with the query's subject, or near it."""
Kind = Literal[LookAlikeKind, "topic"]
"""How a negative differs from its query; see docs/corpora.md."""

LOOK_ALIKE_KINDS: tuple[str, ...] = get_args(LookAlikeKind)
KINDS: tuple[str, ...] = get_args(Kind)
PARAPHRASE = "paraphrase"
MINED = "mined"
"""The kind of a negative that was found, not written: how it differs is not known."""


def role_of(kind: str) -> str:
    """Say what a text of a kind is to its query.

    Parameters
    ----------
    kind : str
        ``paraphrase``, the kind of a negative, or ``mined``.

    Returns
    -------
    str
        ``paraphrase`` or ``negative``.
    """
    return PARAPHRASE if kind == PARAPHRASE else "negative"


def _field(name: str, type_: pa.DataType, meaning: str) -> pa.Field:
    """Make a field that is never null and says what it means."""
    return pa.field(name, type_, nullable=False, metadata={"meaning": meaning})


def _measured(name: str, meaning: str) -> pa.Field:
    """Make the field of a number that is null where there was nothing to measure it by."""
    return pa.field(name, pa.float64(), nullable=True, metadata={"meaning": meaning})


QUERIES = pa.schema(
    [
        _field("query_id", pa.string(), "digest of the normalised query"),
        _field("query", pa.string(), "the query, in Unicode NFC with single blanks"),
        _field("group", pa.string(), "digest shared by queries that differ in case, spacing or marks only"),
        _field("canonical", pa.bool_(), "the group's first spelling: the one that is augmented"),
        _field("count", pa.int64(), "how often the log holds this spelling"),
        _field("split", pa.string(), "train, validation or test; one for a whole group"),
    ]
)

AUGMENTED = pa.schema(
    [
        _field("query_id", pa.string(), "the query that the text was written for"),
        _field("kind", pa.string(), "paraphrase, or the kind of a negative"),
        _field("text", pa.string(), "what the LLM wrote, normalised"),
        _field("engine", pa.string(), "type of the engine that gave it"),
        _field("model", pa.string(), "the LLM that wrote it"),
        _field("prompt_version", pa.string(), "digest of the prompts, or the version that the recording names"),
    ]
)

FILTERED = pa.schema(
    [
        _field("query_id", pa.string(), "the canonical query that the text belongs to"),
        _field("kind", pa.string(), "paraphrase, the kind of a negative, or mined"),
        _field("text", pa.string(), "the text"),
        _field("source", pa.string(), "llm, rule (made of the query by a rule) or mined (another query of the domain)"),
        _field("similarity", pa.float64(), "its cosine with the query, by the base model"),
        _field("reasons", pa.list_(pa.string()), "the filters that drop it; empty if it is kept"),
    ]
)

VERDICTS = pa.schema(
    [
        _field("query_id", pa.string(), "the canonical query that the text belongs to"),
        _field("text", pa.string(), "the text"),
        _field("verdict", pa.string(), "same if one answer serves both, different, or none if the judge said nothing"),
        _field("engine", pa.string(), "type of the engine that was asked, or cross_encoder"),
        _field("model", pa.string(), "the model that judged"),
        _field("prompt_version", pa.string(), "digest of the prompt; empty for a cross-encoder"),
    ]
)

NEGATIVE = pa.struct(
    [
        _field("kind", pa.string(), "its kind"),
        _field("text", pa.string(), "its text"),
        _field("source", pa.string(), "llm, rule or mined"),
    ]
)

TRIPLETS = pa.schema(
    [
        _field("anchor", pa.string(), "a paraphrase"),
        _field("positive", pa.string(), "the canonical query that it paraphrases"),
        _field("negatives", pa.list_(NEGATIVE), "the hard negatives of the group, at least one"),
        _field("group", pa.string(), "the group of equivalent texts"),
        _field("split", pa.string(), "train or validation"),
    ]
)

TESTSET = pa.schema(
    [
        _field("test_id", pa.string(), "digest of the three texts"),
        _field("anchor", pa.string(), "a query"),
        _field("positive", pa.string(), "an answer-equivalent query"),
        _field("negative", pa.string(), "a look-alike that needs another answer"),
        _field("kind", pa.string(), "how the negative differs"),
        _field("group", pa.string(), "shared by triplets that share a text: they are not independent of one another"),
        _field("test_version", pa.string(), "version of the test set: frozen as v1, v2 ...; else what it was made of"),
    ]
)

PAIRS = pa.schema(
    [
        _field("pair_id", pa.string(), "digest of the two texts"),
        _field("query", pa.string(), "the anchor of the triplet that the pair comes from"),
        _field("other", pa.string(), "its positive or its negative"),
        _field("same_answer", pa.bool_(), "whether one answer serves both: true for the positive"),
        _field("kind", pa.string(), "paraphrase, or the kind of the negative"),
        _field("group", pa.string(), "the group of the triplet"),
        _field("part", pa.string(), "calibration (thresholds are chosen on it) or test; one for a whole group"),
    ]
)

LABELLED = pa.schema(
    [
        _field("test_set", pa.string(), "the domain, or the name of the set"),
        _field("test_version", pa.string(), "version of that set"),
        _field("test_id", pa.string(), "the triplet, which stands in two rows, or the pair"),
        _field("pair_id", pa.string(), "digest of the two texts"),
        _field("query", pa.string(), "the query that comes in"),
        _field("other", pa.string(), "a query that the cache holds"),
        _field("same_answer", pa.bool_(), "whether one answer serves both"),
        _field("kind", pa.string(), "how the triplet's negative differs; empty for pairs that do not say"),
        _field("group", pa.string(), "shared by pairs that share a text: they are not independent of one another"),
    ]
)

SCORES = pa.schema(
    [
        *(LABELLED.field(name) for name in ("test_set", "test_version", "test_id", "pair_id", "same_answer")),
        *(LABELLED.field(name) for name in ("kind", "group")),
        _field("similarity", pa.float64(), "cosine of the two texts"),
    ]
)

CURVES = pa.schema(
    [
        _field("test_set", pa.string(), "the domain, or the name of the set"),
        _field("threshold", pa.float64(), "cosine at and above which a pair hits"),
        _field("metric", pa.string(), "precision, recall, false_hit_rate or hit_ratio; docs/metrics.md"),
        _measured("value", "its value; null where nothing hits and precision is asked"),
        _measured("low", "lower end of its interval; null for fewer than ten groups"),
        _measured("high", "upper end"),
    ]
)

THRESHOLDS = pa.schema(
    [
        _field("test_set", pa.string(), "the domain on whose test part it is tried, or `all domains`"),
        _field("fitted_on", pa.string(), "own calibration part, that of all domains, or fixed"),
        _measured("budget", "largest false-hit rate allowed; null for fixed"),
        _measured("threshold", "cosine at and above which a pair hits; null if none can be shown to keep the budget"),
        _field("calibration_negatives", pa.int64(), "pairs with another answer that it was chosen on"),
        _field("calibration_effective", pa.float64(), "independent pairs that these are worth at least"),
        _field("calibration_false_hits", pa.int64(), "how many of them hit"),
        _measured("upper", "upper bound of the false-hit rate, by the calibration part"),
        _field("positives", pa.int64(), "pairs with the same answer in the test part"),
        _field("negatives", pa.int64(), "pairs with another answer in it"),
        *(
            _measured(f"{name}{end}", f"{meaning}{place}")
            for name, meaning in (
                ("recall", "share of the positives that hit"),
                ("false_hit_rate", "share of the negatives that hit"),
                ("hit_ratio", "share of all pairs that hit"),
                ("precision", "share of the hits that are positives"),
            )
            for end, place in (("", ""), ("_low", ": lower end of its interval"), ("_high", ": upper end"))
        ),
    ]
)

REPLAY = pa.schema(
    [
        _field("label", pa.string(), "the threshold: the false-hit budget that it was chosen for, or fixed"),
        _field("threshold", pa.float64(), "cosine at and above which a query hits"),
        _field("number", pa.int64(), "place of the query in the stream, counted from 1"),
        _field("test_set", pa.string(), "the domain whose test set it comes from"),
        _field("form", pa.string(), "new, repeat, paraphrase or look-alike, as against the stream before it"),
        _field("text", pa.string(), "the query"),
        _field("outcome", pa.string(), "hit, false hit or miss"),
        _measured("similarity", "cosine with the nearest stored query; null while nothing is stored"),
        _field("nearest", pa.string(), "that stored query; empty while nothing is stored"),
    ]
)
