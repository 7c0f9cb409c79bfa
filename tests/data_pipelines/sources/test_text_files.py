import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.sources import BadExample, Example, open_source, text_files


def test_a_document_a_file(tmp_path: Path, read: Callable, read_all: Callable) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "sub" / "b.txt").write_bytes(b"three")
    source = open_source(f"textfiles:unsupervised={tmp_path}/**/*.txt")
    assert source.splits == ("validation", "unsupervised") and len(source.class_names) == 0
    found = read_all(source.name)
    assert sorted(found) == [
        Example("a.txt", "one\r\ntwo\n", None),
        Example("sub/b.txt", "three", None),
    ]


def test_parts_are_groups_of_files(
    tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PART_FILES", 3)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    spec = f"textfiles:unsupervised={tmp_path}/[0-6].txt,validation={tmp_path}/[7-9].txt"
    source = open_source(spec)
    assert source.parts("unsupervised") == ["files 0", "files 3", "files 6"]
    assert [e.text for e in read(source, "unsupervised")] == [f"text {i}" for i in range(7)]
    assert [e.id for e in read(source, "validation")] == ["7.txt", "8.txt", "9.txt"]


def test_dirty_files_are_told_once_by_name(tmp_path: Path, read_all: Callable) -> None:
    whole = gzip.compress(b"good film " * 99)
    dirty = {
        "cut.gz": whole[:-12],
        "empty": b"",
        "latin": b"caf\xe9",
        "nul": b"a\0",
        "none.gz": b"no gzip",
    }
    for name, data in dirty.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.gz").write_bytes(whole)
    found = read_all(f"textfiles:{tmp_path}/*")
    bad = {Path(e.where).name: e.why for e in found if isinstance(e, BadExample)}
    assert set(bad) == set(dirty) and len(found) == len(dirty) + 1
    assert "Truncated" in bad["cut.gz"] and "empty" in bad["empty"]
    assert "byte 0xe9" in bad["latin"] and "NUL" in bad["nul"] and "zlib" in bad["none.gz"]
