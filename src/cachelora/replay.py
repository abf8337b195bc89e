"""Stage `replay`: a stream of queries through a cache, to see what a threshold does in operation.

The queries come from the test part of the domains' test sets, for the thresholds were chosen on the calibration part. A
pair of texts meets once in the metrics; in a cache a query meets all that was stored before it.
"""

import bisect
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cachelora.config import Evaluate
from cachelora.config import Replay as ReplaySettings
from cachelora.errors import InputError, ModelError
from cachelora.evaluate import MIN_GROUPS
from cachelora.metrics import interval
from cachelora.schemas import REPLAY
from cachelora.text import connected_groups, digest, trivial_key
from cachelora.thresholds import ALL, ALL_DOMAINS, FIXED

if TYPE_CHECKING:
    from faiss import IndexFlatIP
    from sentence_transformers import SentenceTransformer

NEW, REPEAT, REWORDED, LOOK_ALIKE = FORMS = ("new", "repeat", "paraphrase", "look-alike")
HIT, FALSE_HIT, MISS = OUTCOMES = ("hit", "false hit", "miss")
_FRONTIER = np.round(np.arange(0.5, 1.001, 0.02), 2)
_POINTS = 50
"""Points of the hit ratio over time."""
_AT_ONCE = 1024
"""Queries that are looked up together; each still meets those of them that are stored before it."""
_SLACK = 1e-6
"""Cosines in float32 are no more exact: a text reaches the threshold 1 with itself."""
_TIMED = 300
"""Queries that are timed, one by one."""
_WARM_UP = 8


@dataclass(frozen=True)
class Stream:
    """Queries in the order in which they come.

    Attributes
    ----------
    texts : list of str, length u
        The distinct texts.
    classes : numpy.ndarray, shape (u,), int64
        Number of the answer that each needs.
    events : pandas.DataFrame
        A row for each query: row (of the text, from 0), form (one of :data:`FORMS`), intent, test_set.
    left_out : int
        Labelled pairs that take no part in it.
    """

    texts: list[str]
    classes: np.ndarray
    events: pd.DataFrame
    left_out: int


@dataclass
class _Intent:
    """What people want to know, with the words for it."""

    name: str
    test_set: str
    wordings: list[str]
    look_alikes: list[str]
    asked: list[str] = field(default_factory=list)
    look_alikes_asked: int = 0


def draw_stream(parts: Mapping[str, pd.DataFrame], settings: ReplaySettings, seed: int) -> Stream:
    """Draw a stream of queries from labelled pairs.

    Texts that pairs of one answer join, directly or through others and other domains, form an answer class; texts that
    differ in case, spacing or marks only count as one there. A class with the query of a pair is an intent: the texts
    of the class are its wordings, the negatives of its queries its look-alikes. A negative is of the class of its own
    text. Only pairs of the test part take part, without those of which a text stands in a calibration part, whatever
    domain's, and without negatives that are of their query's own class.

    Intents, wordings and look-alikes are ordered by a hash with the seed. A query is drawn in three steps. (1) Its
    intent: the r-th with a probability proportional to r to the power of minus ``exponent`` (Zipf 1949). (2) What it
    is: the first query of an intent has its first wording. After that it is a look-alike with the probability
    ``look_alike_share``, another wording with ``paraphrase_share``, else one of the intent's wordings asked before. (3)
    The words: the next look-alike or wording that the intent was not asked with. Where there is none, a wording asked
    before, or any of the look-alikes. Its form then says what the stream held before: these words (``repeat``),
    nothing of the intent (``new``), other words of it (``paraphrase``); a ``look-alike`` comes for the first time.

    Parameters
    ----------
    parts : mapping of str to pandas.DataFrame
        Labelled pairs by domain, in the columns of :data:`cachelora.schemas.PAIRS`.
    settings : cachelora.config.Replay
        Length, popularity, shares.
    seed : int
        Seed of the draw. The same seed gives the same stream on every machine.

    Returns
    -------
    Stream
        The queries.

    Raises
    ------
    InputError
        If no pair of the test part is left.
    """
    pairs, left_out = _usable_pairs(parts)
    intents, class_of = _intents(pairs, seed)
    random = Random(seed)
    rows: dict[str, int] = {}
    events = []
    for intent in _drawn(intents, settings, random):
        text, form = _words(intent, settings, random)
        if text in rows:
            form = REPEAT
        events.append((rows.setdefault(text, len(rows)), form, intent.name, intent.test_set))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(class_of.values()))}
    return Stream(
        texts=[*rows],
        classes=np.array([numbers[class_of[trivial_key(text)]] for text in rows], dtype=np.int64),
        events=pd.DataFrame(events, columns=["row", "form", "intent", "test_set"]),
        left_out=left_out,
    )


def _usable_pairs(parts: Mapping[str, pd.DataFrame]) -> tuple[list[tuple[str, str, str, bool]], int]:
    """Return (domain, query, other, same answer) of the pairs that take part, and the number of the others."""
    seen = {
        trivial_key(text)
        for table in parts.values()
        for name in ("query", "other")
        for text in table.loc[table["part"] == "calibration", name]
    }
    tested = [
        (domain, row.query, row.other, bool(row.same_answer))
        for domain, table in parts.items()
        for row in table[table["part"] == "test"].itertuples()
    ]
    unseen = [pair for pair in tested if trivial_key(pair[1]) not in seen and trivial_key(pair[2]) not in seen]
    class_of = _classes(unseen)
    usable = [
        (domain, query, other, same)
        for domain, query, other, same in unseen
        if same or class_of[trivial_key(query)] != class_of[trivial_key(other)]
    ]
    if not usable:
        raise InputError(
            f"test sets of {', '.join(parts)}",
            "no pair of the test part is left for the replay",
            "Give more test triplets, or lower testset.calibration_share",
        )
    return usable, len(tested) - len(usable)


def _classes(pairs: Sequence[tuple[str, str, str, bool]]) -> dict[str, str]:
    """Return the answer class of each text, by its key."""
    joined = [[trivial_key(query), trivial_key(other)] for _, query, other, same in pairs if same]
    keys = [*dict.fromkeys(trivial_key(text) for _, query, other, _ in pairs for text in (query, other))]
    groups = connected_groups([*joined, *([key] for key in keys)])
    return dict(zip(keys, groups[len(joined) :], strict=True))


def _intents(pairs: Sequence[tuple[str, str, str, bool]], seed: int) -> tuple[list[_Intent], dict[str, str]]:
    """Return the intents in the order of their popularity, and the answer class of each text by its key."""
    class_of = _classes(pairs)
    found: dict[str, _Intent] = {}
    for domain, query, other, same in pairs:
        name = class_of[trivial_key(query)]
        intent = found.setdefault(name, _Intent(name, domain, [], []))
        intent.wordings += [query, other] if same else [query]
        intent.look_alikes += [] if same else [other]

    def by_hash(text: str) -> str:
        return digest(f"{seed} {text}")

    for intent in found.values():
        intent.wordings = sorted(set(intent.wordings), key=by_hash)
        intent.look_alikes = sorted(set(intent.look_alikes), key=by_hash)
    return sorted(found.values(), key=lambda intent: by_hash(intent.name)), class_of


def _drawn(intents: Sequence[_Intent], settings: ReplaySettings, random: Random) -> Iterator[_Intent]:
    """Draw the intent of each query."""
    up_to = [*itertools.accumulate(rank**-settings.exponent for rank in range(1, len(intents) + 1))]
    for _ in range(settings.queries):
        # Python's `random` gives the same numbers in every version, which NumPy does not promise.
        yield intents[bisect.bisect_right(up_to, random.random() * up_to[-1], hi=len(intents) - 1)]


def _words(intent: _Intent, settings: ReplaySettings, random: Random) -> tuple[str, str]:
    """Draw the words of a query, with its form if they were never asked."""
    what, which = random.random(), random.random()
    left = [wording for wording in intent.wordings if wording not in intent.asked]
    if intent.asked and intent.look_alikes and what < settings.look_alike_share:
        next_one, intent.look_alikes_asked = intent.look_alikes_asked, intent.look_alikes_asked + 1
        if next_one >= len(intent.look_alikes):
            next_one = int(which * len(intent.look_alikes))
        return intent.look_alikes[next_one], LOOK_ALIKE
    if not intent.asked or (left and what < settings.look_alike_share + settings.paraphrase_share):
        form = REWORDED if intent.asked else NEW
        intent.asked.append(left[0])
        return left[0], form
    return intent.asked[int(which * len(intent.asked))], REPEAT


@dataclass(frozen=True)
class Decisions:
    """What a cache did with each query.

    Attributes
    ----------
    similarity : numpy.ndarray, shape (n,), float64
        Cosine with the nearest stored query; not a number while nothing is stored.
    nearest : numpy.ndarray, shape (n,), int64
        The row of that query's text; -1 while nothing is stored.
    hit : numpy.ndarray, shape (n,), bool
        Whether the cache answered.
    """

    similarity: np.ndarray
    nearest: np.ndarray
    hit: np.ndarray


def replay(vectors: np.ndarray, rows: np.ndarray, threshold: float) -> Decisions:
    """Send queries through a cache that begins empty.

    A query whose nearest stored query is at least as similar as the threshold is answered by the cache, rightly or not,
    and nothing is stored; any other goes to the LLM, and is stored with its answer. What is right therefore does not
    change what the cache does.

    Parameters
    ----------
    vectors : numpy.ndarray, shape (u, d), float32
        Unit vectors of the distinct texts.
    rows : numpy.ndarray, shape (n,), int64
        For each query the row of its text, in the order in which they come.
    threshold : float
        Least cosine of a hit. A millionth less suffices, for float32 is no more exact.

    Returns
    -------
    Decisions
        One for each query.

    Raises
    ------
    ModelError
        If a vector is not of numbers.
    """
    if not np.isfinite(vectors).all():
        raise ModelError("the model", "its embeddings are not all numbers", "Train it again with a lower learning rate")
    index = _index(vectors[:0])
    stored: list[int] = []
    similarity, nearest = np.full(len(rows), np.nan), np.full(len(rows), -1, dtype=np.int64)
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        queries = np.ascontiguousarray(vectors[some], dtype=np.float32)
        found, places = index.search(queries, 1) if stored else (np.full((len(some), 1), -np.inf), None)
        among = queries @ queries.T
        new: list[int] = []
        for number in range(len(some)):
            best, row = found[number, 0], stored[places[number, 0]] if places is not None else -1
            # Those of the same lot are not in the index yet.
            if new and (inside := among[number, new]).max() > best:
                best, row = inside.max(), some[new[int(inside.argmax())]]
            if row >= 0:
                similarity[start + number], nearest[start + number] = best, row
            # As a number of Python: NumPy would compare in float32, and not as below.
            if not float(best) >= threshold - _SLACK:
                new.append(number)
        index.add(queries[new])
        stored += some[new].tolist()
    similarity = np.clip(similarity, -1, 1)
    return Decisions(similarity, nearest, np.nan_to_num(similarity, nan=-np.inf) >= threshold - _SLACK)


def _index(vectors: np.ndarray) -> "IndexFlatIP":
    """Make an index of vectors that compares all of them."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index


@dataclass(frozen=True)
class Choice:
    """A threshold to replay.

    Attributes
    ----------
    label : str
        What it is called, such as ``5 % false hits`` or ``fixed 0.80``.
    budget : float or None
        The false-hit budget that it was chosen for; None for the fixed one.
    value : float or None
        Least cosine of a hit; None where no threshold keeps to the budget.
    """

    label: str
    budget: float | None
    value: float | None


def choices_of(thresholds: pd.DataFrame) -> list[Choice]:
    """List the thresholds that hold for all domains.

    Parameters
    ----------
    thresholds : pandas.DataFrame
        Of a model, in the columns of :data:`cachelora.schemas.THRESHOLDS`.

    Returns
    -------
    list of Choice
        Those that were fitted on all domains, and the fixed one, in the table's order.
    """
    common = thresholds[(thresholds["test_set"] == ALL_DOMAINS) & thresholds["fitted_on"].isin([ALL, FIXED])]
    return [
        Choice(
            f"fixed {row.threshold:.2f}" if row.fitted_on == FIXED else f"{100 * row.budget:g} % false hits",
            None if row.fitted_on == FIXED else row.budget,
            None if math.isnan(row.threshold) else row.threshold,
        )
        for row in common.itertuples()
    ]


def _right(stream: Stream, decisions: Decisions) -> np.ndarray:
    """Say of each query whether the nearest stored one has its answer."""
    return stream.classes[stream.events["row"]] == stream.classes[decisions.nearest]


def replay_table(stream: Stream, decisions: Decisions, choice: Choice) -> pd.DataFrame:
    """Say what became of each query.

    Parameters
    ----------
    stream : Stream
        The queries.
    decisions : Decisions
        What the cache did with them.
    choice : Choice
        The threshold.

    Returns
    -------
    pandas.DataFrame
        In the columns of :data:`cachelora.schemas.REPLAY`, and intent.
    """
    rows, texts = stream.events["row"].to_numpy(), [*stream.texts, ""]
    right = _right(stream, decisions)
    return stream.events.assign(
        label=choice.label,
        threshold=choice.value,
        number=np.arange(1, len(rows) + 1),
        text=[texts[row] for row in rows],
        outcome=np.select([decisions.hit & right, decisions.hit], [HIT, FALSE_HIT], MISS),
        similarity=decisions.similarity,
        # -1, for no query, is the empty text at the end.
        nearest=[texts[row] for row in decisions.nearest],
    )[[*REPLAY.names, "intent"]]


def summarise(table: pd.DataFrame, choice: Choice, settings: Evaluate, seed: int) -> dict[str, Any]:
    """Count what a cache did at one threshold.

    Parameters
    ----------
    table : pandas.DataFrame
        What :func:`replay_table` gives.
    choice : Choice
        The threshold.
    settings : Evaluate
        Number of resamples, coverage.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict
        label, budget, threshold; queries, hits (with the right answer), false_hits, misses; hit_ratio (share of the
        queries that hit, rightly or not), calls_saved (share that hit rightly), false_hit_share (share that hit
        falsely) and false_hits_of_hits (share of all hits), each with ``_low`` and ``_high``; by_form and by_test_set:
        the counts of each; over_time: the first three shares of the queries so far, at 50 points.

        The intervals are percentile bootstrap intervals over intents: the queries of one intent come and go together.
        The stream is not replayed for each draw, so they leave out that other intents would fill the cache otherwise.
        None where there are fewer than ten intents, or all draws agree, as where no query hits falsely.
        false_hits_of_hits is None without a hit.
    """
    return (
        {"label": choice.label, "budget": choice.budget, "threshold": choice.value}
        | _counts(table)
        | _shares_with_intervals(table, settings, seed)
        | {
            f"by_{name}": {key: _counts(rows) for key, rows in table.groupby(name, sort=False)}
            for name in ("form", "test_set")
        }
        | {"over_time": _over_time(table)}
    )


def _counts(table: pd.DataFrame) -> dict[str, int]:
    """Count outcomes."""
    hits, false_hits, misses = (int((table["outcome"] == outcome).sum()) for outcome in OUTCOMES)
    return {"queries": len(table), "hits": hits, "false_hits": false_hits, "misses": misses}


def _shares(queries: np.ndarray, hits: np.ndarray, false_hits: np.ndarray) -> dict[str, np.ndarray]:
    """Return the shares of a cache; not a number where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "hit_ratio": (hits + false_hits) / queries,
            "calls_saved": hits / queries,
            "false_hit_share": false_hits / queries,
            "false_hits_of_hits": false_hits / (hits + false_hits),
        }


def _shares_with_intervals(table: pd.DataFrame, settings: Evaluate, seed: int) -> dict[str, float | None]:
    """Return the shares of a cache with their intervals over intents."""
    outcome = pd.DataFrame({name: table["outcome"] == name for name in (HIT, FALSE_HIT)}).assign(queries=1)
    of_intents = outcome.groupby(table["intent"].to_numpy()).sum()[["queries", HIT, FALSE_HIT]].to_numpy(np.float64)
    intents = len(of_intents)
    resamples = settings.bootstrap if intents >= MIN_GROUPS else 0
    draws = np.random.default_rng(seed).integers(intents, size=(resamples, intents))
    weights = np.stack([np.ones(intents), *(np.bincount(draw, minlength=intents) for draw in draws)])
    found: dict[str, float | None] = {}
    for name, values in _shares(*(weights @ of_intents).T).items():
        finite = values[1:][np.isfinite(values[1:])]
        # What never happens in the stream does not happen in any draw: that gives no bound.
        low, high = interval(finite, settings.confidence) if len(finite) and np.ptp(finite) else (None, None)
        found |= {name: None if math.isnan(values[0]) else float(values[0]), f"{name}_low": low, f"{name}_high": high}
    return found


def _over_time(table: pd.DataFrame) -> list[dict[str, float]]:
    """Return the shares of the queries so far."""
    so_far = [np.cumsum(table["outcome"] == outcome) for outcome in (HIT, FALSE_HIT)]
    ends = np.unique(np.linspace(0, len(table), _POINTS + 1).round().astype(int))[1:]
    shares = _shares(ends, *(counted.to_numpy()[ends - 1] for counted in so_far))
    names = ("hit_ratio", "calls_saved", "false_hit_share")
    return [
        {"queries": int(end)} | {name: float(shares[name][place]) for name in names} for place, end in enumerate(ends)
    ]


def frontier(stream: Stream, vectors: np.ndarray) -> list[dict[str, float]]:
    """Replay a stream at each threshold of a grid: which calls a cache can save at which cost in false hits.

    Two models are compared at equal false hits, for one threshold means another thing to each of them.

    Parameters
    ----------
    stream : Stream
        The queries.
    vectors : numpy.ndarray, shape (u, d), float32
        Unit vectors of its distinct texts.

    Returns
    -------
    list of dict
        threshold, from .5 to 1, hit_ratio, calls_saved and false_hit_share, shares of the queries.
    """
    rows, found = stream.events["row"].to_numpy(), []
    for threshold in _FRONTIER:
        decisions = replay(vectors, rows, threshold)
        right = _right(stream, decisions)
        shares = _shares(np.array(len(rows)), (decisions.hit & right).sum(), np.asarray((decisions.hit & ~right).sum()))
        names = ("hit_ratio", "calls_saved", "false_hit_share")
        found.append({"threshold": float(threshold)} | {name: float(shares[name]) for name in names})
    return found


def describe_stream(stream: Stream) -> dict[str, Any]:
    """Say what a stream holds.

    Parameters
    ----------
    stream : Stream
        The queries.

    Returns
    -------
    dict
        queries, distinct_texts, intents, left_out_pairs, by_form, and best_hit_ratio: the share of the queries whose
        answer some earlier query needed too, which is what a cache that is never wrong saves.
    """
    answers = pd.Series(stream.classes[stream.events["row"]])
    counted = stream.events["form"].value_counts()
    return {
        "queries": len(answers),
        "distinct_texts": len(stream.texts),
        "intents": stream.events["intent"].nunique(),
        "left_out_pairs": stream.left_out,
        "by_form": {form: int(counted.get(form, 0)) for form in FORMS},
        "best_hit_ratio": float(answers.duplicated().mean()),
    }


def latencies(
    model: "SentenceTransformer", texts: Sequence[str], vectors: np.ndarray, stored: np.ndarray
) -> dict[str, float | int]:
    """Measure how long a query takes, one at a time.

    Parameters
    ----------
    model : SentenceTransformer
        The model.
    texts : sequence of str, length u
        The distinct texts; up to 300 of them are timed.
    vectors : numpy.ndarray, shape (u, d), float32
        Their unit vectors.
    stored : numpy.ndarray, shape (m,), int64
        Rows of those that the index holds.

    Returns
    -------
    dict
        encode_ms_p50, encode_ms_p95, search_ms_p50, search_ms_p95: wall-clock milliseconds, median and 95th percentile;
        timed_queries; index_size.
    """
    index = _index(vectors[stored])
    encode, search = [], []
    # The first calls set things up that later ones find.
    model.encode(list(texts[:_WARM_UP]))
    for row in range(min(len(texts), _TIMED)):
        started = time.perf_counter()
        vector = model.encode([texts[row]], normalize_embeddings=True, show_progress_bar=False)
        encoded = time.perf_counter()
        index.search(vector, 1)
        search.append(time.perf_counter() - encoded)
        encode.append(encoded - started)
    return {
        f"{name}_ms_p{share}": round(1000 * float(np.percentile(seconds, share)), 3)
        for name, seconds in (("encode", encode), ("search", search))
        for share in (50, 95)
    } | {"timed_queries": len(encode), "index_size": len(stored)}
