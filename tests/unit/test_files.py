import json
import stat

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachelora.errors import DamagedError, InputError
from cachelora.files import check_reject_share, read_records, read_table, replacing, write_json, write_table
from cachelora.schemas import SCORES, TESTSET


def test_each_format_gives_the_same_records(tmp_path):
    queries = ["what is gout", 'a "quoted", query', "zwei Wörter 心"]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"query": q}) for q in queries), encoding="utf-8")
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(queries).encode())
    pd.DataFrame({"query": queries}).to_csv(tmp_path / "q.csv", index=False)
    pd.DataFrame({"query": queries}).to_parquet(tmp_path / "q.parquet")
    for name in ("q.jsonl", "q.txt", "q.csv", "q.parquet"):
        records, rejects = read_records(tmp_path / name)
        assert [record.fields["query"] for record in records] == queries, name
        assert rejects == []


def test_rejects_name_line_and_reason(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(
        b'{"query": "ok"}\n\n{broken\n[1]\n{"query": "caf\xe9"}\n{"n": ' + b"9" * 5000 + b'}\n{"a": "\\ud800"}\n'
    )
    records, rejects = read_records(path)
    assert [record.line for record in records] == [1]
    assert [(reject.line, reject.reason.split(" (")[0]) for reject in rejects] == [
        (3, "not JSON"),
        (4, "not a JSON object"),
        (5, "not UTF-8"),
        (6, "not JSON"),
        (7, "holds half a character"),
    ]


def test_a_flipped_byte_in_a_table_is_found(tmp_path):
    table = pd.DataFrame(
        [[str(i), f"anchor {i}", "b", "c", "topic", "g", "v1"] for i in range(500)], columns=TESTSET.names
    )
    write_table(tmp_path / "t.parquet", table, TESTSET)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DamagedError, match="not a readable Parquet file"):
        read_table(tmp_path / "t.parquet", TESTSET)


def test_csv_rejects_name_line_and_reason(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes(b'query,n\n"two\nlines",1\ncaf\xe9,2\na,b,c\nlast,3\n')
    records, rejects = read_records(path)
    assert [(record.line, record.fields["query"]) for record in records] == [(2, "two\nlines"), (6, "last")]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (4, "not UTF-8"),
        (5, "more fields than the header has"),
    ]


def test_lines_lost_to_an_unclosed_quote_all_count(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("query\ngood\n" + '"never closed\n' + "lost\n" * 98)
    records, rejects = read_records(path)
    assert (len(records), len(rejects)) == (1, 99)


def test_only_line_ends_end_a_csv_line(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("query\nfirst\u2028second\n", encoding="utf-8")
    assert [record.fields["query"] for record in read_records(path)[0]] == ["first\u2028second"]


@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".csv", ".txt", ".parquet"]))
def test_any_bytes_give_records_or_an_input_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("any") / f"q{suffix}"
    path.write_bytes(content)
    try:
        records, rejects = read_records(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert records or rejects


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file"),
        ("utf16.txt", "what".encode("utf-16"), "UTF-16"),
        ("nul.csv", b"query\na\0b\n", "binary"),
        ("cut.parquet", b"PAR1abcPAR1", "not a readable Parquet file"),
        ("empty.jsonl", b"", "empty"),
        ("q.xlsx", b"x", "unknown format '.xlsx'"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_records(path)


def test_reject_share_stops_above_the_limit_only(tmp_path):
    path = tmp_path / "q.txt"
    path.write_bytes(b"a\nb\nc\n\xff\n")
    records, rejects = read_records(path)
    check_reject_share(path, len(records), rejects, 0.25, "some.key")
    with pytest.raises(InputError, match=r"q\.txt, line 4: not UTF-8; 1 of 4 records are bad.*some\.key = 0\.2 "):
        check_reject_share(path, len(records), rejects, 0.2, "some.key")
    with pytest.raises(InputError, match="none of the 1 records is good"):
        check_reject_share(path, 0, rejects, 1.0, "some.key")


def test_replacing_keeps_the_old_file_when_the_work_fails(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_can_be_read_by_others(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) & 0o044 == 0o044


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_tables_keep_their_contract(tmp_path):
    table = pd.DataFrame([["1", "a", "b", "c", "topic", "g", "v1"]], columns=TESTSET.names)
    write_table(tmp_path / "t.parquet", table, TESTSET)
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet", TESTSET), table)
    with pytest.raises(DamagedError, match="not those of its contract"):
        read_table(tmp_path / "t.parquet", SCORES)
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    with pytest.raises(DamagedError, match="not a readable Parquet file"):
        read_table(tmp_path / "t.parquet", TESTSET)
