import gzip
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources.rows import kind_and_path, read_rows


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.csv", ("csv", "a.csv")),
        ("a.tsv.gz", ("tsv", "a.tsv.gz")),
        ("gs://b/a.jsonl.zst", ("jsonl", "gs://b/a.jsonl.zst")),
        ("csv:-", ("csv", "-")),
        ("-", ("text", "-")),
        ("jsonl:odd:name.csv", ("jsonl", "odd:name.csv")),
        ("notes", ("text", "notes")),
    ],
)
def test_kind_of_a_file(spec: str, expected: tuple[str, str]) -> None:
    assert kind_and_path(spec) == expected


def test_rows_of_several_files_come_in_order(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text('n,text\n1,a\n2,"b\nc"\n3,d\n')
    (tmp_path / "2.csv").write_text("text\ne\n")
    rows = list(read_rows(f"{tmp_path}/*.csv"))
    assert [row.text for row in rows] == ["a", "b\nc", "d", "e"]
    assert [row.where.split("/")[-1] for row in rows] == [
        *("1.csv, line 2", "1.csv, line 3", "1.csv, line 5", "2.csv, line 2")
    ]
    assert rows[1].values == {"n": "2", "text": "b\nc"}


def test_a_compressed_file_and_its_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n[]\n{"text": 3}\n\n{"body": "y"}\n'))
    rows = list(read_rows(str(path)))
    assert [row.fault for row in rows] == [
        "",
        "a list instead of a JSON object",
        "'text' is a number, not text",
        "an empty line",
        "'text' is missing, not text",
    ]


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"hello\n" * 1000)[:-20])
    with pytest.raises(InputError, match=r"a.txt.gz is cut off"):
        list(read_rows(str(path)))
