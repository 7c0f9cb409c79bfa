import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, open_source
from data_pipelines.sources.cifar10 import FILES, RECORD_BYTES

NAMES = [name for names in FILES.values() for name in names]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "cifar-10-batches-bin"
    data.mkdir()
    random = np.random.default_rng(0)
    for name in NAMES:
        records = random.integers(0, 256, (30, RECORD_BYTES), np.uint8)
        records[:, 0] %= 10
        (data / name).write_bytes(records.tobytes())
    return data


def test_folder_and_archive(folder: Path, tmp_path: Path, read: Callable) -> None:
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-bin")
    source = open_source(f"cifar10:{folder}")
    archive = open_source(f"cifar10:{tmp_path}/cifar-10-binary.tar.gz")
    found = {split: read(source, split) for split in source.splits}
    assert {split: read(archive, split) for split in source.splits} == found
    assert len(found["train"]) + len(found["validation"]) == 150 and found["validation"]
    assert len(found["test"]) == 30 and source.num_classes == 10
    assert len(source.class_names) == 10
    assert {e.label for e in found["train"]} == set(range(10))
    assert "the paper reads rows of real numbers" in source.note


def test_words_are_the_pixels_in_reading_order(folder: Path, read: Callable) -> None:
    planes = np.zeros((3, 32, 32), np.uint8)
    planes[:, 0, 1] = 255  # white
    planes[0, 0, 2] = 255  # red: 0.299 of 256 levels
    planes[:, 31, 0] = 16
    (folder / "test_batch.bin").write_bytes(b"\x03" + planes.tobytes())
    (example,) = read(open_source(f"cifar10:{folder}"), "test")
    rows = [row.split(" ") for row in example.text.split("\n")]
    assert [len(row) for row in rows] == [32] * 32
    assert rows[0][:4] == ["g0", "g15", "g4", "g0"] and rows[31][:2] == ["g1", "g0"]
    assert (example.label, example.id) == (3, "test_batch.bin:0")


@pytest.mark.parametrize(("name", "splits"), [("test_batch.bin", ["test"]),
                         ("data_batch_2.bin", ["train", "validation"])])  # fmt: skip
def test_bad_records_are_told_once(
    folder: Path, read: Callable, name: str, splits: list[str]
) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[2 * RECORD_BYTES] = 10
    path.write_bytes(data + b"123")
    source = open_source(f"cifar10:{folder}")
    told = [e for split in splits for e in read(source, split) if isinstance(e, BadExample)]
    assert sorted(told) == [
        BadExample(f"{path}, record 2", "label 10 is not in 0 .. 9"),
        BadExample(f"{path}, record 30", "cut off: 3 of 3073 bytes"),
    ]


def test_missing_files_are_all_named(folder: Path) -> None:
    for name in NAMES[3:]:
        (folder / name).unlink()
    with pytest.raises(InputError) as caught:
        open_source(f"cifar10:{folder}")
    assert [line.split(" has no ")[1] for line in str(caught.value).splitlines()] == NAMES[3:]
