import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, Example, open_source

ROWS = [{"text": f"text {i} caf\u00e9", "label": ("no", "yes")[i % 2], "n": i} for i in range(500)]


def write(path: Path, rows: list[dict] | pa.Table, row_group_size: int = 60) -> str:
    table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def test_a_row_group_is_a_part(tmp_path: Path, read: Callable) -> None:
    write(tmp_path / "a.parquet", ROWS)
    write(tmp_path / "b.parquet", ROWS[:5])
    source = open_source(f"parquet:{tmp_path}/*.parquet", id_key="n")
    assert source.class_names == ("no", "yes") and source.splits == ("train", "validation", "test")
    assert source.parts("train") == [
        *(f"a.parquet[{i}:{i + 1}]" for i in range(9)),
        "b.parquet[0:1]",
    ]
    found = [e for split in source.splits for e in read(source, split)]
    assert sorted((e.text, e.label, e.id) for e in found) == sorted(
        (row["text"], row["n"] % 2, str(row["n"])) for row in [*ROWS, *ROWS[:5]]
    )


def test_the_same_documents_as_in_json_lines(
    tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    path = write(tmp_path / "a.parquet", ROWS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet = open_source(f"parquet:{path}")
    lines = open_source(f"jsonl:{tmp_path}/a.jsonl")
    for split in lines.splits:
        assert [(e.text, e.label) for e in read(parquet, split)] == [
            (e.text, e.label) for e in read(lines, split)
        ]
    first = read(parquet, "train")[0]
    assert first.id == f"a.parquet@{int(first.text.split()[1])}"


def test_dirty_rows_are_named(tmp_path: Path, read: Callable) -> None:
    rows = [*ROWS[:70], {"text": None, "label": "no"}, {"text": " ", "label": "no"}, *ROWS[70:90]]
    rows.append({"text": "x", "label": None})
    path = write(tmp_path / "a.parquet", rows)
    source = open_source(f"parquet:train={path}")
    found = [e for split in source.splits for e in read(source, split)]
    assert len([e for e in found if isinstance(e, Example)]) == 90
    assert [e for e in found if isinstance(e, BadExample)] == [
        BadExample(f"{path}, row 71", "'text' is missing, not text"),
        BadExample(f"{path}, row 72", "the text is empty"),
        BadExample(f"{path}, row 93", "'label' is missing, not a word or a whole number"),
    ]


def test_other_types_and_only_the_columns_that_are_asked_for(
    tmp_path: Path, read: Callable
) -> None:
    table = pa.table(
        {
            "body": pa.array(["a", "b"]).dictionary_encode(),
            "stars": pa.array([5, 1], pa.int8()),
            "embedding": pa.array([[0.5] * 3] * 2),
        }
    )
    path = write(tmp_path / "a.parquet", table)
    source = open_source(f"parquet:train={path}", text_key="body", label_key="stars")
    found = [e for split in source.splits for e in read(source, split)]
    assert {(e.text, e.label) for e in found} == {("a", 1), ("b", 0)}
    assert source.class_names == ("1", "5")
    with pytest.raises(InputError, match=r"has no 'text' \(--text_key\); it has body, stars"):
        open_source(f"parquet:{path}")


def test_damage_is_named(tmp_path: Path, read: Callable) -> None:
    path = Path(write(tmp_path / "a.parquet", ROWS))
    data = path.read_bytes()
    for content in (b"", b"no parquet at all", data[:-20], data[: len(data) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.parquet cannot be read as Parquet: .+"):
            open_source(f"parquet:{path}")
    path.write_bytes(data)
    source = open_source(f"parquet:unsupervised={path}", with_labels=False)
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as Parquet: .+"):
        [e for split in source.splits for e in read(source, split)]


def test_a_file_without_rows(tmp_path: Path, read: Callable) -> None:
    table = pa.table({"text": pa.array([], pa.string())})
    source = open_source(f"parquet:{write(tmp_path / 'a.parquet', table)}")
    assert [e for split in source.splits for e in read(source, split)] == []


MEMORY = """
import resource, sys
from data_pipelines.sources import open_source
source = open_source(f"parquet:unsupervised={sys.argv[1]}", with_labels=False)
part = source.parts("unsupervised")[0]
next(source.examples("unsupervised", part))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for split in source.splits for e in source.examples(split, part))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.seconds
def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(2000))
    rows = pa.table({"text": pa.array([f"{i} {text}" for i in range(100_000)])})  # 200 MB
    path = write(tmp_path / "a.parquet", rows, row_group_size=100_000)
    command = [sys.executable, "-c", MEMORY, path]
    result = subprocess.run(command, capture_output=True, text=True)
    count, kilobytes = map(int, result.stdout.split())
    assert count == 100_000 and kilobytes < 100_000
