import csv
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, Example, dbpedia, open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "dbpedia_csv"
    data.mkdir()
    for name, count in (("train", 400), ("test", 70)):
        with (data / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
            for i in range(count):
                writer.writerow([i % 14 + 1, f'A "{i}", Ltd', f" {name} \u00e9 {i}."])
    return data


def test_folder_in_parts_and_archive(
    folder: Path, tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "dbpedia_csv.tar.gz", "w:gz") as tar:
        tar.add(folder, "dbpedia_csv")
    archive = open_source(f"dbpedia:{tmp_path}/dbpedia_csv.tar.gz")
    whole = open_source(f"dbpedia:{folder}")
    monkeypatch.setattr(dbpedia, "PART_BYTES", 300)
    source = open_source(f"dbpedia:{folder}")
    assert len(source.parts("train")) > 40 and archive.parts("train") == ["archive"]
    found = {split: read(source, split) for split in source.splits}
    for split, examples in found.items():
        assert examples == read(whole, split) == read(archive, split)
    assert len(found["train"]) + len(found["validation"]) == 400 and len(found["validation"]) > 20
    assert len(found["test"]) == 70 and len(source.class_names) == 14
    assert len(source.class_names) == 14
    assert found["test"][15] == Example(found["test"][15].id, 'A "15", Ltd test \u00e9 15.', 1)
    assert len({e.id for e in found["train"]}) == len(found["train"])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'"15","a","b"', "class '15' is not in 1 .. 14"),
        (b'"x","a","b"', "class 'x'"),
        (b'"1","a"', "2 columns instead of 3"),
        (b'"1","a","b', "not CSV"),
        (b'"1"," ",""', "the text is empty"),
        (b'"1","a","\xff"', "not UTF-8: byte 0xff"),
        (b"", "0 columns instead of 3"),
    ],
)
def test_dirty_lines(folder: Path, read: Callable, line: bytes, why: str) -> None:
    (folder / "test.csv").write_bytes(b'"1","a","b"\n' + line + b'\n"2","c","d"')
    good, bad, last = read(open_source(f"dbpedia:{folder}"), "test")
    assert (good.text, last.text, last.label) == ("a b", "c d", 1)
    assert bad.where == f"{folder}/test.csv, line 2" and why in bad.why
    (folder / "train.csv").write_bytes(line + b"\n")
    source = open_source(f"dbpedia:{folder}")
    told = read(source, "train") + read(source, "validation")
    assert [type(e) for e in told] == [BadExample]


def test_missing_file_is_named(folder: Path) -> None:
    (folder / "test.csv").unlink()
    with pytest.raises(InputError, match=r"has no test\.csv$"):
        open_source(f"dbpedia:{folder}")
