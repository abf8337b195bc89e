"""Before and after on a log without labels: by hand on small vectors and through the command; and how it is shown."""

import os
import pty
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from cachelora.cli import main
from cachelora.compare import BEGINS, STOPS, compare, comparison_tables, fitted_threshold, write_changed
from cachelora.config import Train
from cachelora.errors import ConfigError
from cachelora.files import write_table
from cachelora.manifest import write_manifest
from cachelora.models import base_digest
from cachelora.schemas import THRESHOLDS, TRIPLETS
from cachelora.terminal import plain, print_table
from cachelora.train import Training, train_model


def on_circle(*degrees):
    """Unit vectors at angles, in two dimensions."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def cosine(degrees):
    return float(np.cos(np.radians(degrees)))


LOG = ["enable wifi", "turn wifi on", "disable wifi", "enable wifi", "disable wifi", "bake bread", "to bake the bread"]


def by_hand():
    """Before, `disable` hits `enable` and `turn on` does not; after, the other way round; `bake` stops hitting too."""
    before = on_circle(0, 60, 20, 150, 160)
    after = on_circle(0, 15, 70, 150, 200)
    return compare(LOG, (before, after), (cosine(30), cosine(30)))


def test_a_log_by_hand():
    found = by_hand()
    assert (found.queries, found.distinct, found.exact_repeats) == (7, 5, 2)
    # Before: disable twice, enable again, bake. After: turn on, enable again, disable again.
    assert found.hits == (4, 3)
    rows = found.changed[["change", "query", "stored_query", "times", "difference"]].to_numpy().tolist()
    assert rows == [
        [BEGINS, "turn wifi on", "enable wifi", 1, "other words"],
        # The words do not differ, so the loss looks worst.
        [STOPS, "to bake the bread", "bake bread", 1, ""],
        # Once: the second time it meets itself.
        [STOPS, "disable wifi", "enable wifi", 1, "other words"],
    ]
    assert found.changed["cosine_before"].to_numpy() == pytest.approx([cosine(60), cosine(10), cosine(20)], abs=1e-6)
    assert found.changed["cosine_after"].to_numpy() == pytest.approx([cosine(15), cosine(50), cosine(70)], abs=1e-6)


def test_another_number_looks_worse_than_other_words():
    log = ["sort a dict", "order a mapping", "sort a dict 12 times"]
    # Before, nothing hits; after, both hit the first. The one with another version comes first, though it was nearer.
    found = compare(log, (on_circle(0, 80, 40), on_circle(0, 0, 0)), (0.95, 0.9)).changed
    assert found["query"].tolist() == ["sort a dict 12 times", "order a mapping"]
    assert found["difference"].tolist() == ["number", "other words"]
    # The other way round, the one whose words tell of no number is the worse loss.
    found = compare(log, (on_circle(0, 0, 0), on_circle(0, 80, 40)), (0.9, 0.95)).changed
    assert found["query"].tolist() == ["order a mapping", "sort a dict 12 times"]


def test_among_alike_pairs_the_base_model_s_cosine_decides():
    # All hit after and none before; `how to enable x` and its twin say the same.
    log = ["how to enable x", "enable x", "enable x before y", "enable x after y"]
    found = compare(log, (on_circle(0, 40, 80, 140), on_circle(0, 0, 0, 0)), (0.95, 0.9)).changed
    assert found["query"].tolist() == ["enable x after y", "enable x before y", "enable x"]
    # None hits after: the nearer it was, the worse.
    log = ["enable x", "how to enable x", "how do I enable x"]
    found = compare(log, (on_circle(0, 10, 5), on_circle(0, 120, 240)), (0.9, 0.95)).changed
    assert found["query"].tolist() == ["how do I enable x", "how to enable x"]
    assert set(found["change"]) == {STOPS}


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.floats(-1, 1), st.floats(-1, 1))
def test_hits_change_by_the_pairs_that_change(seed, queries, before, after):
    random = np.random.default_rng(seed)
    numbers = random.integers(40, size=queries)
    log = [f"word{number}" for number in numbers]
    vectors = random.normal(size=(2, len(set(log)), 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    found = compare(log, (vectors[0], vectors[1]), (before, after))
    times = found.changed.groupby("change")["times"].sum()
    assert found.hits[1] - found.hits[0] == times.get(BEGINS, 0) - times.get(STOPS, 0)
    assert min(found.hits) >= found.exact_repeats
    same = compare(log, (vectors[0], vectors[0]), (before, before))
    assert same.hits[0] == same.hits[1] and same.changed.empty


def test_pairs_become_a_csv_file_without_formulas(tmp_path):
    log = ["=cmd|' /C calc'!A0", "@x", "-1 volt", 'quoted, "text"']
    found = compare(log, (on_circle(0, 90, 180, 270), on_circle(0, 1, 2, 3)), (0.9, 0.9))
    write_changed(tmp_path / "o.csv", found.changed)
    table = pd.read_csv(tmp_path / "o.csv")
    assert sorted(table["query"]) == sorted(["'@x", "'-1 volt", 'quoted, "text"'])
    assert set(table["stored_query"]) == {"'=cmd|' /C calc'!A0"}
    assert not [line for line in (tmp_path / "o.csv").read_text().splitlines() if line[0] in "=+-@"]


def test_twenty_pairs_are_shown_and_all_are_counted():
    log = [f"word{number}" for number in range(1, 40)]
    apart, together = np.eye(39, dtype=np.float32), np.tile(np.eye(39, dtype=np.float32)[0], (39, 1))
    tables = [*comparison_tables(compare(log, (apart, together), (0.8, 0.8)), (0.8, 0.8), ("default", "given"))]
    assert tables[0][2] == [
        ["before", "0.8000", "default", "0", "0.0%", "0"],
        ["after", "0.8000", "given", "38", "97.4%", "38"],
    ]
    assert tables[1][0].startswith("Pairs that become hits: 38, 20 of them here")
    assert [len(rows) for _, _, rows in tables] == [2, 20, 0]
    assert tables[2][0] == "Pairs that stop being hits: 0"


def test_a_table_on_a_pipe_is_plain_and_shows_texts_as_they_are(capsys):
    texts = ["[red]x[/red] :smile:", "\x1b[31mred\x1b[0m\x07", "turned \u202eround", "long " * 100]
    print_table(
        "A [bold]title[/bold]\x1b[1m", ["text", "number"], [[text, number] for number, text in enumerate(texts)]
    )
    said = capsys.readouterr().out
    assert said.isprintable() is False and all(part.isprintable() for part in said.split("\n"))
    assert "A [bold]title[/bold] [1m" in said
    assert "[red]x[/red] :smile:" in said
    assert "[31mred [0m" in said
    assert "turned round" in said
    # A row is a line, however long, and the numbers stand at the right.
    rows = [line for line in said.splitlines() if re.search(r"\d$", line)]
    assert len(rows) == 4 and len({len(line) for line in rows}) == 1
    assert "long " * 99 + "long" in rows[3]


def test_a_table_on_a_terminal_has_colour_and_fits():
    code = "from cachelora.terminal import print_table; print_table('T', ['head', 'n'], [['long words ' * 30, 1]])"
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    env |= {"COLUMNS": "60", "TERM": "xterm-256color"}
    subprocess.run([sys.executable, "-c", code], stdout=theirs, env=env, check=True)
    os.close(theirs)
    said = b""
    # At the end of what was written, Linux reports an error.
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:
        pass
    os.close(ours)
    assert b"\x1b[1" in said
    bare = re.sub(r"\x1b\[[0-9;]*m", "", said.decode())
    assert "head" in bare and max(len(line) for line in bare.splitlines()) <= 60
    assert bare.count("long") == bare.count("words") == 30


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_letter_that_the_encoding_lacks_ends_nothing(encoding):
    code = "from cachelora.terminal import print_table; print_table('T', ['h'], [['caf\\u00e9 ok']])"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True).stdout
    assert ("caf? ok" if encoding == "ascii" else "café ok") in said.decode(encoding)


@given(st.text())
def test_plain_text_is_printable_and_on_one_line(text):
    shown = plain(text)
    assert shown.isprintable()
    assert plain(shown) == shown


def save_thresholds(results, *rows, model="toy"):
    """Write (fitted_on, budget, threshold) as the thresholds for all domains of an adapter."""
    names = ("fitted_on", "budget", "threshold")
    zeros = {name: 0 for name in THRESHOLDS.names if name not in names}
    table = pd.DataFrame([dict(zip(names, row, strict=True)) | zeros for row in rows])
    table = table.assign(test_set="all domains").astype({"budget": float, "threshold": float})
    write_table(results / f"thresholds/minilm-l6/{model}.parquet", table, THRESHOLDS)


def test_the_threshold_that_the_workflow_chose_is_found(tmp_path):
    adapter = tmp_path / "models/minilm-l6/toy"
    with pytest.raises(ConfigError, match=r"the workflow has chosen no threshold for it\. Give --threshold and"):
        fitted_threshold(adapter)
    save_thresholds(tmp_path, ("all", 0.01, 0.9), ("all", 0.05, 0.87), ("own", 0.05, 0.5), ("fixed", None, 0.8))
    assert fitted_threshold(adapter) == 0.87
    with pytest.raises(ConfigError, match="the workflow has chosen no threshold for it"):
        fitted_threshold("/toy")
    save_thresholds(tmp_path, ("all", 0.05, None))
    with pytest.raises(ConfigError, match=r"no threshold was shown to keep to 5% false hits\. Give --threshold and"):
        fitted_threshold(adapter)
    save_thresholds(tmp_path, ("all", 0.01, 0.9))
    with pytest.raises(ConfigError, match="it has no threshold for 5% false hits"):
        fitted_threshold(adapter)


TOPICS = ("wifi", "bluetooth", "roaming", "captions", "sync", "cookies", "haptics", "backup", "vpn", "narrator")


@pytest.fixture(scope="module")
def results(tmp_path_factory, base):
    """A results folder with an adapter that moves `disable` away from `enable`."""
    results = tmp_path_factory.mktemp("results")
    rows = [
        (f"activate {topic} for me", f"how to enable {topic}",
         [{"kind": "polarity", "text": f"how to disable {topic}", "source": "llm"}])
        for topic in TOPICS
    ]  # fmt: skip
    triplets = pd.DataFrame(
        [(*row, str(n), "validation" if n < 3 else "train") for n, row in enumerate(rows)], columns=TRIPLETS.names
    )
    write_table(results / "toy.parquet", triplets, TRIPLETS)
    settings = Train(rank=2, learning_rate=2e-3, epochs=4, batch_size=4, precision="float32")
    adapter = results / "models/minilm-l6/toy"
    toy = {"toy": str(results / "toy.parquet")}
    train_model(Training(base, toy, settings, 1, str(adapter), str(results / "state")))
    write_manifest(adapter, {"base_sha256": base_digest(base)}, [], time.monotonic())
    save_thresholds(results, ("all", 0.05, 0.75))
    save_thresholds(results, ("all", 0.05, 0.8), model="base")
    return results


def test_the_command_shows_what_an_adapter_changes(results, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log.txt"
    asked = [f"how to {word} {topic}" for topic in TOPICS[:3] for word in ("enable", "disable", "enable")]
    log.write_text("\n".join([*asked, "how to [red]enable[/red] \x1b[31mwifi"]), encoding="utf-8")
    adapter = str(results / "models/minilm-l6/toy")
    output = tmp_path / "changed.csv"
    assert main(["compare", str(log), "--adapter", adapter, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "10 queries, 7 distinct, 3 exact repeats" in said
    assert "\x1b" not in said
    before, after = (
        re.search(rf"^ *{name} +(\S+) +(.*?) +(\d+) +", said, re.MULTILINE) for name in ("before", "after")
    )
    assert before.groups()[:2] == ("0.8000", "chosen by the workflow")
    assert after.groups()[:2] == ("0.7500", "chosen by the workflow")
    table = pd.read_csv(output)
    stops = table[table["change"] == STOPS]
    assert stops["query"].str.startswith("how to disable").any()
    assert (stops["cosine_before"] >= 0.8 - 1e-6).all()
    changes = table.groupby("change")["times"].sum()
    assert int(after[3]) - int(before[3]) == changes.get(BEGINS, 0) - changes.get(STOPS, 0)
    # The base model has the same threshold beside it: all that is lost is the adapter's doing.
    arguments = ["compare", str(log), "--adapter", adapter, "--threshold", "0.5", "--threshold-after", "-1"]
    assert main([*arguments, "--limit", "4"]) == 0
    said = capsys.readouterr().out
    assert "4 queries, 3 distinct, 1 exact repeats" in said
    assert re.search(r"^ *after +-1\.0000 +given +3 +75\.0%", said, re.MULTILINE)


def test_text_of_a_log_is_shown_as_text(results, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log.csv"
    log.write_text('query\nhow to enable wifi\n"[red]wifi[/red] \x1b[31m\u202e"\n???\n' + "x\n" * 40, encoding="utf-8")
    adapter = str(results / "models/minilm-l6/toy")
    assert main(["compare", str(log), "--adapter", adapter, "--threshold", "1", "--threshold-after", "-1"]) == 0
    said = capsys.readouterr()
    assert "[red]wifi[/red] [31m" in said.out
    assert not set("\x1b\u202e") & {*said.out}
    assert "1 records are set aside; the first is line 4, 'query' holds no word" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--adapter", "nowhere"],
            "ERROR --adapter nowhere: the workflow has chosen no threshold for it. Give --thresh",
        ),
        (["--adapter", "nowhere", "--threshold-after", "0.8"], "ERROR nowhere: no such folder"),
        (["--adapter", "nowhere", "--base", "x"], "ERROR --base x: no such base model"),
        (["--adapter", "nowhere", "--output", "x.txt"], "ERROR --output x.txt: the pairs are written as CSV"),
        (["--adapter", "nowhere", "--output", "LOG"], "that is the log. Name another file"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log.csv"
    log.write_text("query\nhow to enable wifi\n", encoding="utf-8")
    arguments = [str(log) if argument == "LOG" else argument for argument in arguments]
    assert main(["compare", str(log), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert log.read_text() == "query\nhow to enable wifi\n"


@pytest.mark.parametrize("threshold", ["nan", "1.5", "x"])
def test_a_threshold_is_a_cosine(capsys, threshold):
    with pytest.raises(SystemExit):
        main(["compare", "log.txt", "--adapter", "a", "--threshold", threshold])
    assert "argument --threshold" in capsys.readouterr().err
