import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "rt-polaritydata"
    data.mkdir()
    for name in ("pos", "neg"):
        lines = [f"{name} film number {i} caf\xe9 \x85 . \n" for i in range(300)]
        lines[7] = "\n"
        (data / f"rt-polarity.{name}").write_bytes("".join(lines).encode("latin-1"))
    return data


def test_folder_and_archive(folder: Path, tmp_path: Path, read: Callable) -> None:
    with tarfile.open(tmp_path / "rt-polaritydata.tar.gz", "w:gz") as tar:
        tar.add(folder, "rt-polaritydata")
    one = open_source(f"rt_polarity:{folder}")
    other = open_source(f"rt_polarity:{tmp_path}/rt-polaritydata.tar.gz")
    found = {split: read(one, split) for split in one.splits}
    every = [e for examples in found.values() for e in examples]
    good = [e for e in every if not isinstance(e, BadExample)]
    assert len(every) == 600 and len(good) == len({e.id for e in good}) == 598
    assert abs(len(found["train"]) - 480) < 30 and abs(len(found["test"]) - 60) < 25
    for split, examples in found.items():
        kept = [e for e in read(other, split) if not isinstance(e, BadExample)]
        assert kept == [e for e in examples if not isinstance(e, BadExample)]
    for example in good:
        name, _, _, number, accent, *_ = example.text.split(" ")
        assert example.label == ["neg", "pos"].index(name) and accent == "caf\u00e9"
        assert example.id == f"rt-polarity.{name}:{int(number) + 1}"
    bad = {e for e in every if isinstance(e, BadExample)}
    assert bad == {
        BadExample(f"{folder}/rt-polarity.{name}, line 8", "the text is empty")
        for name in ("pos", "neg")
    }


def test_missing_file_is_named(folder: Path) -> None:
    (folder / "rt-polarity.neg").unlink()
    with pytest.raises(InputError, match=r"has no rt-polarity\.neg$"):
        open_source(f"rt_polarity:{folder}")
