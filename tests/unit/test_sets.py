"""Test sets of anybody's making: from files and addresses to a table of what models make of them."""

import json
import re
import shutil
import ssl
import subprocess
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from cachelora.cli import main
from cachelora.config import Evaluate, LabelledSet
from cachelora.errors import InputError
from cachelora.files import find_file
from cachelora.models import encode_texts, load_model
from cachelora.schemas import LABELLED
from cachelora.sets import fetch_set, measure_models, read_set, read_sets, set_tables, write_measured
from cachelora.text import trivial_key

SHARED = ROOT.parent / "shared/data/labelled"
NO_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason="the public labelled sets are not on this machine")
SETTINGS = Evaluate(bootstrap=200)
PAIRS = [
    ("symptoms of gout", "signs of podagra", 1),
    ("symptoms of gout", "treatment of gout", 0),
    ("reset my password", "I forgot my password and need a new one", 1),
    ("how to enable 2FA", "how to disable 2FA", 0),
    ("how to enable 2FA", "turn on two-factor authentication", 1),
]
TRIPLETS = [
    {"anchor": "symptoms of gout", "positive": "gout symptoms", "negative": "best pizza in Rome", "kind": "topic"},
    {"anchor": "how to enable 2FA", "positive": "bake bread", "negative": "how to disable 2FA", "kind": "polarity"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path):
    return write(tmp_path / "pairs.jsonl", [dict(zip(("a", "b", "label"), row, strict=True)) for row in PAIRS])


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, None)


def value(table, metric, column="value", kind="all"):
    return table[(table["metric"] == metric) & (table["kind"] == kind)][column].iloc[-1]


def test_pairs_are_measured_as_by_hand(pairs_file, model):
    pairs = read_set(pairs_file, "mine")
    table = measure_models(pairs, {"base": model}, SETTINGS, 1, 1)
    vectors = encode_texts(model, [text for row in PAIRS for text in row[:2]], 8)
    cosines = np.array([vectors[a] @ vectors[b] for a, b, _ in PAIRS])
    labels = np.array([label for *_, label in PAIRS])
    assert set(table["test_set"]) == {"mine"} and set(table["n"]) == {5} and set(table["groups"]) == {3}
    assert value(table, "margin") == pytest.approx(cosines[labels == 1].mean() - cosines[labels == 0].mean(), abs=1e-6)
    assert value(table, "ap") == pytest.approx(average_precision_score(labels, cosines))
    assert value(table, "roc_auc") == pytest.approx(roc_auc_score(labels, cosines))
    # Pairs have no triplets to rank.
    assert "accuracy" not in set(table["metric"])


def test_triplets_keep_their_kind_and_have_an_accuracy(tmp_path, model):
    pairs = read_set(write(tmp_path / "t.jsonl", TRIPLETS), "mine")
    assert pairs["kind"].tolist() == ["topic", "topic", "polarity", "polarity"]
    table = measure_models(pairs, {"base": model, "same": model}, SETTINGS, 1, 1)
    assert value(table, "accuracy") == 0.5
    assert (value(table, "accuracy", kind="topic"), value(table, "accuracy", kind="polarity")) == (1, 0)
    assert (table["change"] == 0).all()
    # Two groups say how they differ, not how others would.
    assert table[["low", "high", "change_low", "change_high"]].isna().all().all()


def test_what_stands_in_a_file_twice_is_taken_once(tmp_path):
    rows = [*TRIPLETS, TRIPLETS[0]]
    assert len(read_set(write(tmp_path / "t.jsonl", rows), "mine")) == 4


texts = st.sampled_from(["gout", "Gout?", "podagra", "a cold", "A  cold.", "flu", "2FA", "taxes"])


@given(rows=st.lists(st.tuples(texts, texts, st.booleans()), min_size=2, max_size=20))
def test_every_format_gives_the_same_pairs_and_no_text_is_in_two_groups(tmp_path_factory, rows):
    labels = {}
    for a, b, label in rows:
        labels.setdefault(frozenset((trivial_key(a), trivial_key(b))), set()).add(label)
    folder = tmp_path_factory.mktemp("sets")
    table = pd.DataFrame(rows, columns=["a", "b", "label"]).astype({"label": int})
    table.to_csv(folder / "p.csv", index=False)
    table.to_parquet(folder / "p.parquet", index=False)
    write(folder / "p.jsonl", table.to_dict("records"))
    paths = [folder / f"p.{ending}" for ending in ("csv", "parquet", "jsonl")]
    if any(len(found) > 1 for found in labels.values()) or len({label for *_, label in rows}) < 2:
        for path in paths:
            with pytest.raises(InputError):
                read_set(path, "mine")
        return
    found = [read_set(path, "mine").drop(columns="test_version") for path in paths]
    assert found[0].equals(found[1]) and found[1].equals(found[2])
    groups = {}
    for row in found[0].itertuples():
        for text in (row.query, row.other):
            assert groups.setdefault(trivial_key(text), row.group) == row.group
    assert {(row.query, row.other, row.same_answer) for row in found[0].itertuples()} == {
        (" ".join(a.split()), " ".join(b.split()), label) for a, b, label in rows
    }


def test_a_written_test_set_of_a_run_is_a_set_too(tmp_path):
    """The columns of the contract TESTSET: a finished run's test sets can be given as files."""
    table = pd.DataFrame(TRIPLETS).assign(test_id=["1", "2"], group=["a", "b"], test_version="v1")
    table.to_parquet(tmp_path / "medical.parquet")
    assert list(read_set(tmp_path / "medical.parquet", "medical").columns) == LABELLED.names


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": "x", "b": "y"}], r"p\.jsonl, line 1: neither a pair nor a triplet \(found: a, b\)"),
        ([{"a": "x", "b": "y", "label": 2}], r"p\.jsonl, line 1: the label is 2\. Give 0 or 1"),
        ([{"a": "x", "b": None, "label": 1}], r"p\.jsonl, line 1: one of its texts is missing"),
        (
            [{"a": "x", "b": "y", "label": 1}, {"a": "Y", "b": "x?", "label": 0}],
            r"p\.jsonl: a pair stands in it with both labels: x \| y",
        ),
        ([{"a": "x", "b": "??", "label": 1}], r"p\.jsonl, line 1: one of its texts is missing"),
        (
            [{"a": "x", "b": "y", "label": 1}, {"anchor": "x", "positive": "y", "negative": "z"}],
            r"p\.jsonl: it holds pairs and triplets",
        ),
        ([{"a": "x", "b": "y", "label": 1}], r"p\.jsonl: all of its pairs have the same label"),
        ([TRIPLETS[0] | {"kind": "odd"}], r"p\.jsonl, line 1: kind 'odd' is none of aspect"),
        ([], r"p\.jsonl: the file is empty"),
    ],
)
def test_bad_sets_are_refused_with_place_and_reason(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_set(write(tmp_path / "p.jsonl", rows), "mine")


def test_a_file_with_another_digest_is_refused(pairs_file):
    digest = sha256(pairs_file.read_bytes()).hexdigest()
    assert read_set(pairs_file, "mine", digest)["test_version"].iloc[0] == f"sha256:{digest[:12]}"
    with pytest.raises(InputError, match=rf"pairs\.jsonl: its SHA-256 is {digest}, not 00"):
        read_set(pairs_file, "mine", "0" * 64)


def test_the_mirror_is_asked_when_the_path_is_no_file_and_before_anything_is_fetched(tmp_path, pairs_file):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    mirrored = write(mirror / "pairs.jsonl", TRIPLETS)
    assert find_file(str(pairs_file), mirror) == pairs_file
    assert find_file("elsewhere/pairs.jsonl", mirror) == mirrored
    assert find_file("https://example.invalid/data/pairs.jsonl", mirror) == mirrored
    assert find_file("https://example.invalid/data/others.jsonl", mirror) is None
    assert find_file("https://example.invalid/..%2F..%2Fpairs.jsonl", mirror) == mirrored
    assert find_file("elsewhere/pairs.jsonl", None) is None
    known = {"far": LabelledSet(source="https://example.invalid/pairs.jsonl", sha256="0" * 64)}
    with pytest.raises(InputError, match="its SHA-256 is"):
        read_sets(["far"], known, mirror)
    with pytest.raises(InputError, match=r"other\.jsonl: no such file\. Correct .*use one of the `sets`: far"):
        read_sets(["other.jsonl"], known, mirror)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An https server that this machine trusts: its address, and what it was asked for."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("server")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
        " -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/good.jsonl":
                content = "".join(json.dumps(row) + "\n" for row in TRIPLETS).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            elif self.path == "/open.jsonl":
                self.send_response(302)
                self.send_header("Location", "http://localhost/good.jsonl")
                self.end_headers()
            elif self.path == "/moved.jsonl":
                self.send_response(302)
                self.send_header("Location", "/good.jsonl")
                self.end_headers()
            elif self.path == "/noise.jsonl":
                self.wfile.write(b"this is not HTTP\r\n\r\n")
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    found = HTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    found.socket = context.wrap_socket(found.socket, server_side=True)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"https://localhost:{found.server_port}", folder / "cert.pem"
    found.shutdown()
    found.server_close()


@pytest.fixture
def address(server, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(server[1]))
    monkeypatch.setenv("no_proxy", "*")
    return server[0]


def test_a_set_is_fetched_and_read(address, tmp_path):
    path = fetch_set(f"{address}/moved.jsonl", tmp_path)
    assert path == tmp_path / "moved.jsonl" and len(path.read_text().splitlines()) == 2
    known = {"far": LabelledSet(source=f"{address}/good.jsonl", sha256=sha256(path.read_bytes()).hexdigest())}
    assert len(read_sets(["far"], known, None)) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", r"the server does not give it \(404 Not Found\)"),
        ("open.jsonl", r"it leads to an address that is not https"),
        ("noise.jsonl", r"it cannot be fetched \(this is not HTTP"),
    ],
)
def test_what_cannot_be_fetched_is_said_and_leaves_no_file(address, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        fetch_set(f"{address}/{name}", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_too_large_is_not_kept(address, tmp_path, monkeypatch):
    monkeypatch.setattr("cachelora.sets.MAX_BYTES", 10)
    with pytest.raises(InputError, match="it is larger than"):
        fetch_set(f"{address}/good.jsonl", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_that_nobody_vouches_for_is_not_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(InputError, match=r"it cannot be fetched \(.*certificate.*\)\. Put good\.jsonl into a folder"):
        fetch_set(f"{server[0]}/good.jsonl", tmp_path)


def measured(changes):
    rows = [
        {"model": model, "test_set": "s", "test_version": "v", "kind": kind, "metric": metric, "n": 20, "groups": 12,
         "value": 0.5, "low": 0.4, "high": 0.6, "change": change, "change_low": change - 0.1,
         "change_high": change + 0.1, "p": None}
        for model, change in changes.items()
        for kind in ("all", "topic")
        for metric in ("margin", "ap", "accuracy")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_tables_show_values_with_intervals_and_mark_changes_that_exclude_zero():
    ((title, head, rows),) = set_tables(measured({"base": 0.0, "adapter": 0.2}), {"s": "what it is"}, 0.05)
    assert title == "s (20 triplets, 12 groups): what it is"
    assert head == ["metric", "base", "adapter", "change"]
    assert rows[0] == ["margin", "0.500 [0.400, 0.600]", "0.500 [0.400, 0.600]", "+0.200 [+0.100, +0.300]*"]
    ((_, head, rows),) = set_tables(measured({"base": 0.0}), {}, 0.05)
    assert head == ["metric", "base"] and [row[0] for row in rows] == ["margin", "AP", "accuracy"]
    ((*_, rows),) = set_tables(measured({"base": 0.0, "adapter": 0.05}), {}, 0.05)
    assert not rows[0][-1].endswith("*")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.md"])
def test_all_that_was_measured_is_written(tmp_path, name):
    table = measured({"base": 0.0, "adapter": 0.2})
    write_measured(tmp_path / name, table)
    if name == "t.csv":
        assert pd.read_csv(tmp_path / name)["value"].tolist() == table["value"].tolist()
    elif name == "t.parquet":
        assert pd.read_parquet(tmp_path / name)["change"].tolist() == table["change"].tolist()
    else:
        assert len((tmp_path / name).read_text().splitlines()) == len(table) + 2


def test_the_command_measures_files_and_sets_of_the_configuration(tmp_path, pairs_file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    content = write(mirror / "t.jsonl", TRIPLETS).read_bytes()
    entry = {"source": "far/t.jsonl", "sha256": sha256(content).hexdigest(), "description": "two triplets"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"mirror": str(mirror), "sets": {"toy": entry}}))
    output = tmp_path / "all.csv"
    arguments = ["evaluate", "toy", str(pairs_file), "--configfile", str(tmp_path / "mine.yaml"), "--output"]
    assert main([*arguments, str(output)]) == 0
    said = capsys.readouterr().out
    assert "toy (2 triplets, 2 groups): two triplets\n" in said
    assert f"{pairs_file} (5 pairs, 3 groups)\n" in said
    # Piped, there is nothing that only a terminal would understand.
    assert "\x1b" not in said
    assert re.search(r"accuracy +0\.500\n", said)
    table = pd.read_csv(output)
    assert set(table["test_set"]) == {"toy", str(pairs_file)} and set(table["model"]) == {"base"}
    assert {"all", "topic", "polarity"} <= set(table["kind"])
    assert main([*arguments, "all.xlsx"]) == 1
    assert "ERROR all.xlsx: its ending names no format of a table. Use one of .csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "ERROR nowhere.jsonl: no such file"),
        (["https://example.invalid/x.jsonl"], "ERROR https://example.invalid/x.jsonl: an address needs a SHA-256"),
        (["--base", "x", "FILE"], "ERROR --base x: no such base model. Use one of minilm-l6"),
        (["--base", "hub:a/b", "FILE"], "ERROR --base hub:a/b: 'hub:a/b' names no commit"),
        (["--base", "package:no-such", "FILE"], "ERROR package:no-such: this package is not installed"),
        (["--adapter", "nowhere", "FILE"], "ERROR nowhere: no such folder"),
        (["--adapter", f"hub:a/b@{'0' * 40}", "FILE"], f"ERROR hub:a/b@{'0' * 40}: the hub is switched off"),
    ],
)
def test_the_command_names_what_is_wrong(pairs_file, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert main(["evaluate", *(str(pairs_file) if word == "FILE" else word for word in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_another_base_model_is_taken_from_a_folder(base, pairs_file, capsys, monkeypatch):
    from cachelora.models import base_folder

    monkeypatch.chdir(ROOT)
    assert main(["evaluate", "--base", str(base_folder(base)), str(pairs_file)]) == 0
    named = capsys.readouterr().out
    assert main(["evaluate", str(pairs_file)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == named.splitlines()[1:]


@NO_SHARED
def test_every_set_of_the_public_preset_is_read():
    preset = yaml.safe_load((ROOT / "config/presets/public.yaml").read_text(encoding="utf-8"))
    sets = {name: LabelledSet(**entry) for name, entry in preset["sets"].items()}
    pairs = read_sets([*sets], sets, SHARED)
    assert set(pairs["test_set"]) == set(sets)
    assert (pairs.groupby("test_set")["same_answer"].nunique() == 2).all()


@NO_SHARED
@pytest.mark.parametrize(
    ("name", "margin"), [("upstream_five_triplets", 0.1687), ("upstream_medical_test_200", 0.4925)]
)
def test_the_base_model_gives_the_known_margin_on_public_sets(name, margin, model):
    pairs = read_set(SHARED / f"{name}.jsonl", name)
    assert value(measure_models(pairs, {"base": model}, SETTINGS, 1, 1), "margin") == pytest.approx(margin, abs=1e-4)


def test_an_output_that_is_the_set_itself_is_refused(pairs_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    csv = tmp_path / "same.csv"
    csv.write_text("a,b,label\nx,y,1\nx,z,0\n", encoding="utf-8")
    before = csv.read_bytes()
    assert main(["evaluate", str(csv), "--output", str(tmp_path / "." / "same.csv")]) == 1
    assert "that is the set" in capsys.readouterr().err
    assert csv.read_bytes() == before


def test_a_table_that_is_none_is_refused(tmp_path, capsys):
    for number, table in enumerate(
        (pd.DataFrame({"source": ["measured"]}), pd.DataFrame({"source": ["x"], "confidence": [1.0]}))
    ):
        path = tmp_path / f"{number}.parquet"
        table.to_parquet(path)
        assert main(["table", str(path)]) == 1
        assert "it is no benchmark table" in capsys.readouterr().err
