"""The check of the corpora: form, counts, repetitions, leaks, reviews and difficulty, as tables and a list of problems.

It looks at what a person or an LLM wrote before anything is trained on it or measured with it; docs/corpora.md has the
rules that it checks. What the texts mean was judged by readers, whose verdicts lie beside each file.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cachelora.config import Config, Domain
from cachelora.errors import InputError
from cachelora.files import read_records, sha256_of, write_json
from cachelora.models import encode_texts
from cachelora.schemas import KINDS, PARAPHRASE, Kind
from cachelora.testset import TEXTS, Frozen, frozen_version, lock_key, read_lock
from cachelora.text import content_words, near_copies, normalise, trivial_key

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOO_EASY = 0.95
"""A kind of negative that TF-IDF tells apart this often, `topic` aside, says nothing about embeddings."""
LOOK_ALIKE = 0.85
"""Base-model cosine from which texts of different sets are listed for a reader."""
LISTED = 15
"""Most look-alikes that are listed."""

Text = Annotated[str, Field(min_length=3)]


class _Record(BaseModel):
    """A line of a corpus file; no other key is allowed."""

    model_config = ConfigDict(extra="forbid", strict=True)


_R = TypeVar("_R", bound=_Record)


class TestRecord(_Record):
    """A line of a test file; see docs/corpora.md."""

    anchor: Text
    positive: Text
    negative: Text
    kind: Kind
    subfield: str
    synonym: bool
    positive_words: Literal["half", "few", "none"]
    negative_form: Literal["one-word", "reworded"]


class QueryRecord(_Record):
    """A line of a file of queries; a log may have more keys."""

    model_config = ConfigDict(extra="ignore", strict=True)

    query: Text
    subfield: str | None = None


class NegativeRecord(_Record):
    """A hard negative."""

    kind: Kind
    text: Text


class AugmentedRecord(_Record):
    """A line of a recording."""

    query: Text
    paraphrases: Annotated[list[Text], Field(min_length=1)]
    negatives: Annotated[list[NegativeRecord], Field(min_length=1)]
    model: str
    prompt_version: str
    engine: str | None = None


class Verdict(_Record):
    """What a reader said of a text beside its query, without knowing what it was meant as."""

    query: Text
    text: Text
    same_answer: bool
    sure: bool
    synonym: bool | None = None
    reason: str
    round: Annotated[int, Field(ge=1)]


@dataclass
class Report:
    """What the check found.

    Attributes
    ----------
    tables : dict of str to pandas.DataFrame
        By title.
    notes : list of str
        What a reader should look at.
    problems : list of str
        What must be mended; the check fails if there is one.
    """

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return everything for reading."""
        parts = ["# Data check"]
        for title, table in self.tables.items():
            parts += [f"## {title}", table.to_markdown(index=False, disable_numparse=True)]
        for title, lines in (("To look at", self.notes), ("Problems", self.problems)):
            parts += [f"## {title} ({len(lines)})", "\n".join(f"* {line}" for line in lines) or "None."]
        return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class _Written:
    """A text of a corpus with its place: the unit in which repetitions are looked for."""

    text: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}"


def positive_words(anchor: str, positive: str) -> str:
    """Say how many of the anchor's content words a positive keeps.

    Parameters
    ----------
    anchor, positive : str
        The two texts.

    Returns
    -------
    str
        ``half`` (or more), ``few`` or ``none``.
    """
    words = content_words(anchor)
    share = len(words & content_words(positive)) / max(1, len(words))
    return "half" if share >= 0.5 else "few" if share else "none"


def negative_form(anchor: str, negative: str) -> str:
    """Say how far a negative's words are from the anchor's.

    Parameters
    ----------
    anchor, negative : str
        The two texts.

    Returns
    -------
    str
        ``one-word`` if at most one content word was replaced, added or removed, else ``reworded``.
    """
    words, others = content_words(anchor), content_words(negative)
    return "one-word" if len(words - others) <= 1 and len(others - words) <= 1 else "reworded"


def check_corpora(config: Config, model: "SentenceTransformer") -> Report:
    """Check the corpora that a configuration names.

    Parameters
    ----------
    config : Config
        The configuration; its paths are relative to the working directory.
    model : SentenceTransformer
        The base model that difficulty is measured with.

    Returns
    -------
    Report
        Tables, notes and problems.

    Raises
    ------
    InputError
        If a file that the configuration names is missing.
    """
    report = Report()
    tests = {name: domain.test for name, domain in config.domains.items() if domain.test}
    recordings = {name: domain for name, domain in config.domains.items() if domain.recording}
    for name in config.domains.keys() - recordings.keys():
        report.notes.append(f"domains.{name}: no recording, so nothing that was written for its queries is checked")
    test_records = {name: _read(path, TestRecord, config.queries.max_chars, report) for name, path in tests.items()}
    query_records = {name: _read_queries(domain.queries, config, report) for name, domain in config.domains.items()}
    augmented = {
        name: _read(domain.recording, AugmentedRecord, config.augment.max_chars, report)
        for name, domain in recordings.items()
    }

    test_texts = [
        _Written(getattr(record, role), tests[name], line)
        for name, records in test_records.items()
        for line, record in records
        for role in TEXTS
    ]
    written = [
        _Written(text, recordings[name].recording, line)
        for name, records in augmented.items()
        for line, record in records
        for text in (record.query, *record.paraphrases, *(negative.text for negative in record.negatives))
    ]
    vectors = encode_texts(model, [item.text for item in test_texts + written])

    for name, path in tests.items():
        _check_test_form(path, test_records[name], report)
    for name, domain in recordings.items():
        _check_recording_form(domain.queries, query_records[name], domain.recording, augmented[name], report)
    _check_repetitions(test_texts, config.triplets.near_copy, report)
    _check_repetitions(written, config.triplets.near_copy, report)
    unwritten = [
        _Written(record.query, config.domains[name].queries, line)
        for name, records in query_records.items()
        if name not in recordings
        for line, record in records
    ]
    for text, test, similarity in _copies(written + unwritten, test_texts, config.triplets.near_copy):
        report.problems.append(f"{text.place}: a copy ({similarity:.2f}) of a test text, {test.place}: {text.text}")
    _list_look_alikes(test_texts, vectors, report)
    _table_tests(tests, test_records, vectors, report)
    _table_recordings(recordings, query_records, augmented, vectors, report)
    return report


def check_frozen(config: Config, report: Report) -> None:
    """Check that the test sets are those that were frozen.

    Parameters
    ----------
    config : Config
        The configuration; nothing is checked if it names no lock.
    report : Report
        Gets a problem for each set that differs or if the lock cannot be read, and a note for each set that is not
        frozen.
    """
    if config.testset.lock is None:
        return
    try:
        lock = read_lock(config.testset.lock)
    except InputError as error:
        report.problems.append(str(error))
        return
    for path in [domain.test for domain in config.domains.values() if domain.test]:
        if lock_key(path) not in lock:
            report.notes.append(f"{path}: not frozen (cachelora data-check --freeze)")
        else:
            try:
                frozen_version(path, lock[lock_key(path)])
            except InputError as error:
                report.problems.append(str(error))


def freeze(config: Config) -> list[str]:
    """Write the lock: a test set that is new or differs from what was frozen gets the next version.

    Parameters
    ----------
    config : Config
        The configuration; ``testset.lock`` names the file.

    Returns
    -------
    list of str
        What was changed, a line for each test set.

    Raises
    ------
    InputError
        If the configuration names no lock, the lock cannot be read, or a test file is missing.
    """
    path = config.testset.lock
    if path is None:
        raise InputError("testset.lock", "missing: there is no file to write to", "Name one in the configuration")
    lock = read_lock(path) if Path(path).exists() else {}
    changes = []
    for domain in config.domains.values():
        if domain.test is None:
            continue
        key = lock_key(domain.test)
        try:
            found, old = sha256_of(domain.test), lock.get(key)
        except OSError as error:
            raise InputError(domain.test, f"it cannot be read ({error.strerror})", "Correct the path") from error
        if old is None or old.sha256 != found:
            lock[key] = Frozen(version=old.version + 1 if old else 1, sha256=found)
            changes.append(f"{domain.test}: frozen as v{lock[key].version}")
    write_json(path, {name: frozen.model_dump() for name, frozen in sorted(lock.items())})
    return changes


def _read_queries(path: str, config: Config, report: Report) -> list[tuple[int, QueryRecord]]:
    """Read a file of queries; in other formats than JSON lines, only the queries themselves."""
    if Path(path).suffix == ".jsonl":
        return _read(path, QueryRecord, config.queries.max_chars, report)
    records, rejects = read_records(path)
    report.problems += [f"{path}, line {reject.line}: {reject.reason}" for reject in rejects]
    texts = [(record.line, record.fields.get("query")) for record in records]
    queries = []
    for line, text in texts:
        if not isinstance(text, str) or not trivial_key(text):
            report.problems.append(f"{path}, line {line}: no query")
        elif len(text) > config.queries.max_chars:
            report.problems.append(f"{path}, line {line}: {len(text)} characters, more than {config.queries.max_chars}")
        else:
            queries.append((line, QueryRecord.model_construct(query=normalise(text), subfield=None)))
    return queries


def _read(path: str, form: type[_R], max_chars: int, report: Report) -> list[tuple[int, _R]]:
    """Read a corpus file; a line that is not of the form is a problem."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            path, f"it cannot be read ({error.strerror})", "Put it there, or correct the configuration"
        ) from error
    if not content:
        report.problems.append(f"{path}: the file is empty")
        return []
    if b"\r" in content:
        report.problems.append(f"{path}: its lines end in CR LF, so its SHA-256 is that of another file")
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        report.problems.append(f"{path}, byte {error.start}: not UTF-8")
        return []
    if lines[-1] != "":
        report.problems.append(f"{path}: the last line has no end")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            if number < len(lines):
                report.problems.append(f"{path}, line {number}: empty")
            continue
        try:
            record = form.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the line"
            report.problems.append(f"{path}, line {number}: {place}: {first['msg']}")
            continue
        for text in _texts(record):
            if normalise(text) != text:
                report.problems.append(f"{path}, line {number}: not in NFC with single blanks: {text!r}")
            elif not trivial_key(text):
                report.problems.append(f"{path}, line {number}: it holds no word: {text!r}")
            elif len(text) > max_chars:
                report.problems.append(f"{path}, line {number}: {len(text)} characters, more than {max_chars}")
        records.append((number, record))
    return records


def _texts(record: BaseModel) -> list[str]:
    """List the texts of a record."""
    found = []
    for value in record.__dict__.values():
        for item in value if isinstance(value, list) else [value]:
            found += _texts(item) if isinstance(item, BaseModel) else [item] if isinstance(item, str) else []
    return found


def _check_test_form(path: str, records: Sequence[tuple[int, TestRecord]], report: Report) -> None:
    """Check one test set on its own: three texts, described as they are, and judged as labelled."""
    verdicts = _read_verdicts(path, report)
    for line, record in records:
        expected = {
            "positive_words": positive_words(record.anchor, record.positive),
            "negative_form": negative_form(record.anchor, record.negative),
        }
        for name, value in expected.items():
            if getattr(record, name) != value:
                report.problems.append(
                    f"{path}, line {line}: {name} is '{getattr(record, name)}' and should be '{value}'"
                )
        if len({trivial_key(text) for text in _texts_of(record)}) < len(TEXTS):
            report.problems.append(f"{path}, line {line}: two of its three texts are the same")
        for text, same in ((record.positive, True), (record.negative, False)):
            _check_verdict(verdicts, record.anchor, text, same, f"{path}, line {line}", report)


def _check_recording_form(
    queries_path: str,
    queries: Sequence[tuple[int, QueryRecord]],
    path: str,
    records: Sequence[tuple[int, AugmentedRecord]],
    report: Report,
) -> None:
    """Check one recording on its own: a record for each query, no text twice in it, and all judged as labelled."""
    asked, answered = [record.query for _, record in queries], [record.query for _, record in records]
    for query in sorted(set(asked) - set(answered)):
        report.problems.append(f"{path}: no record for the query: {query}")
    for query in sorted(set(answered) - set(asked)):
        report.problems.append(f"{queries_path}: lacks the query of a record: {query}")
    verdicts = _read_verdicts(path, report)
    for line, record in records:
        place = f"{path}, line {line}"
        labelled = [(text, True) for text in record.paraphrases] + [(n.text, False) for n in record.negatives]
        keys = Counter(trivial_key(text) for text in (record.query, *(text for text, _ in labelled)))
        for key, count in keys.items():
            if count > 1:
                report.problems.append(f"{place}: {count} of its texts are the same: {key}")
        for text, same in labelled:
            _check_verdict(verdicts, record.query, text, same, place, report)


def _read_verdicts(path: str, report: Report) -> dict[tuple[str, str], Verdict] | None:
    """Read the verdicts that lie beside a file, the last for each pair; None if nobody has reviewed it."""
    review = str(Path(path).with_suffix(".review.jsonl"))
    if not Path(review).exists():
        report.notes.append(f"{path}: not reviewed ({Path(review).name} is missing)")
        return None
    verdicts: dict[tuple[str, str], Verdict] = {}
    for _, verdict in _read(review, Verdict, sys.maxsize, report):
        pair = (verdict.query, verdict.text)
        if pair not in verdicts or verdict.round >= verdicts[pair].round:
            verdicts[pair] = verdict
    return verdicts


def _check_verdict(
    verdicts: Mapping[tuple[str, str], Verdict] | None, query: str, text: str, same: bool, place: str, report: Report
) -> None:
    """Check that a reader was sure that a text is what it is meant as."""
    if verdicts is None:
        return
    verdict = verdicts.get((query, text))
    if verdict is None:
        report.problems.append(f"{place}: no verdict on: {text}")
    elif verdict.same_answer != same or not verdict.sure or verdict.reason.startswith("FACT:"):
        said = ("the same answer" if verdict.same_answer else "another answer") + ("" if verdict.sure else ", not sure")
        report.problems.append(f"{place}: the reader said {said} ({verdict.reason}): {text}")


def _copies(
    texts: Sequence[_Written], others: Sequence[_Written], threshold: float
) -> list[tuple[_Written, _Written, float]]:
    """Find copies and near copies between two lists of texts."""
    found = near_copies([item.text for item in texts], [item.text for item in others], threshold)
    return [(texts[row], others[column], similarity) for row, column, similarity in found]


def _check_repetitions(written: Sequence[_Written], threshold: float, report: Report) -> None:
    """Find texts that stand in two records, exactly or nearly."""
    order = {id(item): number for number, item in enumerate(written)}
    for text, other, similarity in _copies(written, written, threshold):
        if order[id(text)] < order[id(other)] and text.place != other.place:
            report.problems.append(f"{text.place}: nearly the same ({similarity:.2f}) as {other.place}: {text.text}")


def _list_look_alikes(texts: Sequence[_Written], vectors: Mapping[str, np.ndarray], report: Report) -> None:
    """List texts of different sets that the base model finds alike; they may be what the sets are about."""
    matrix = np.stack([vectors[item.text] for item in texts]) if texts else np.zeros((0, 1))
    files = np.array([item.file for item in texts])
    similarity = matrix @ matrix.T
    rows, columns = np.nonzero((similarity >= LOOK_ALIKE) & (files[:, None] < files[None, :]))
    order = np.argsort(-similarity[rows, columns], kind="stable")
    for row, column in zip(rows[order][:LISTED], columns[order][:LISTED], strict=True):
        report.notes.append(
            f"cosine {similarity[row, column]:.2f}: {texts[row].place}: {texts[row].text} | {texts[column].place}: "
            f"{texts[column].text}"
        )
    if len(rows) > LISTED:
        report.notes.append(f"... and {len(rows) - LISTED} more pairs of different sets with a cosine of {LOOK_ALIKE}")


def _table_tests(
    tests: Mapping[str, str],
    test_records: Mapping[str, Sequence[tuple[int, TestRecord]]],
    vectors: Mapping[str, np.ndarray],
    report: Report,
) -> None:
    """Tabulate counts and difficulty of the test sets; a kind that words alone tell apart is a problem."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts, difficulty = [], []
    for name, numbered in test_records.items():
        records = [record for _, record in numbered]
        # TF-IDF weighs words of two letters or more; a set without any was reported where it stands.
        if not any(re.search(r"\w\w", text) for record in records for text in _texts_of(record)):
            continue
        kinds = Counter(record.kind for record in records)
        words, forms = Counter(r.positive_words for r in records), Counter(r.negative_form for r in records)
        counts.append(
            {"test set": name, "triplets": len(records)}
            | {kind: kinds[kind] for kind in KINDS}
            | {"sub-fields": len({record.subfield for record in records})}
            | {"synonym": _percent(sum(record.synonym for record in records), len(records))}
            | {f"positive keeps {level}": _percent(words[level], len(records)) for level in ("half", "few", "none")}
            | {"negative one word": _percent(forms["one-word"], len(records))}
        )
        weights = TfidfVectorizer().fit([text for record in records for text in _texts_of(record)])
        tfidf = _similarities(records, lambda texts, weights=weights: weights.transform(texts).toarray())
        base = _similarities(records, lambda texts: np.stack([vectors[text] for text in texts]))
        for kind in (*KINDS, "all"):
            chosen = np.array([kind in (record.kind, "all") for record in records])
            if not chosen.any():
                continue
            solved = (tfidf[chosen, 0] > tfidf[chosen, 1]).mean()
            positive, negative = base[chosen].T
            difficulty.append(
                {
                    "test set": name,
                    "kind": kind,
                    "triplets": int(chosen.sum()),
                    "TF-IDF accuracy": f"{solved:.2f}",
                    "base accuracy": f"{(positive > negative).mean():.2f}",
                    "base margin": f"{(positive - negative).mean():.3f}",
                }
            )
            if solved > TOO_EASY and kind not in ("topic", "all"):
                report.problems.append(
                    f"{tests[name]}: TF-IDF tells {solved:.0%} of kind {kind} apart: rewrite it with look-alikes"
                )
    report.tables["Test sets"] = pd.DataFrame(counts)
    report.tables["Difficulty of the test sets"] = pd.DataFrame(difficulty)


def _table_recordings(
    recordings: Mapping[str, Domain],
    query_records: Mapping[str, Sequence[tuple[int, QueryRecord]]],
    augmented: Mapping[str, Sequence[tuple[int, AugmentedRecord]]],
    vectors: Mapping[str, np.ndarray],
    report: Report,
) -> None:
    """Tabulate counts of the training corpora and how near their texts are to their queries."""
    counts, nearness = [], []
    for name, numbered in augmented.items():
        records = [record for _, record in numbered]
        if not records:
            continue
        similarity: dict[str, list[float]] = {PARAPHRASE: []} | {kind: [] for kind in KINDS}
        for record in records:
            query = vectors[record.query]
            similarity[PARAPHRASE] += [float(query @ vectors[text]) for text in record.paraphrases]
            for negative in record.negatives:
                similarity[negative.kind].append(float(query @ vectors[negative.text]))
        verdicts = _read_verdicts(recordings[name].recording, Report())
        judged = [] if verdicts is None else [v.synonym for v in verdicts.values() if v.same_answer]
        counts.append(
            {"corpus": name, "queries": len(records)}
            | {"sub-fields": len({query.subfield for _, query in query_records[name]} - {None})}
            | {"paraphrases": len(similarity[PARAPHRASE])}
            | {"synonym": _percent(sum(map(bool, judged)), len(judged)) if judged else "?"}
            | {"negatives": sum(len(similarity[kind]) for kind in KINDS)}
            | {kind: len(similarity[kind]) for kind in KINDS}
        )
        nearness.append(
            {"corpus": name} | {kind: f"{np.mean(values):.2f}" for kind, values in similarity.items() if values}
        )
    if counts:
        report.tables["Training corpora"] = pd.DataFrame(counts)
        report.tables["Mean base-model cosine of the query and what was written for it"] = pd.DataFrame(
            nearness
        ).fillna("")


def _texts_of(record: TestRecord) -> list[str]:
    """List the three texts of a triplet."""
    return [getattr(record, role) for role in TEXTS]


def _similarities(records: Sequence[TestRecord], encode: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Return the cosines of anchor and positive and of anchor and negative, shape (n, 2), of unit vectors."""
    anchors, positives, negatives = (encode([getattr(record, role) for record in records]) for role in TEXTS)
    return np.stack([(anchors * positives).sum(axis=1), (anchors * negatives).sum(axis=1)], axis=1)


def _percent(part: int, whole: int) -> str:
    """Show a share."""
    return f"{100 * part / whole:.0f} %"
