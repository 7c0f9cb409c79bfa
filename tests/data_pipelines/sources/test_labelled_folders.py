import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, open_source
from data_pipelines.sources.labelled_folders import NEWSGROUPS

SHARED = Path(__file__).resolve().parents[4] / "shared"


def pack(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def unpack(folder: Path, members: dict[str, bytes]) -> str:
    for name, data in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def reviews() -> dict[str, bytes]:
    members = {"aclImdb/README": b"about", "aclImdb/train/urls_pos.txt": b"urls"}
    for split, label in [("train", "neg"), ("train", "pos"), ("train", "unsup"), ("test", "neg"),
                         ("test", "pos")]:  # fmt: skip
        for i in range(40):
            members[f"aclImdb/{split}/{label}/{i}_7.txt"] = f"{split} {label} {i}<br />".encode()
    members["aclImdb/test/neg/0_7.txt"] = b"caf\xe9"
    return members


def posts() -> dict[str, bytes]:
    return {
        f"20news-bydate-{split}/{group}/{i}": f"Subject: {split} {group} {i}\n\ncaf\xe9".encode(
            "latin-1"
        )
        for split in ("train", "test")
        for group in NEWSGROUPS
        for i in range(3)
    }


@pytest.mark.parametrize("place", [pack, unpack])
def test_aclimdb(tmp_path: Path, read: Callable, place: Callable) -> None:
    path = place(tmp_path / "aclImdb_v1.tar.gz" if place is pack else tmp_path / "d", reviews())
    source = open_source(f"aclimdb:{path}")
    found = {split: read(source, split) for split in source.splits}
    assert list(found) == ["train", "validation", "test", "unsupervised"]
    assert len(found["train"]) + len(found["validation"]) == 80 and found["validation"]
    assert len(found["test"]) == 80 and len(found["unsupervised"]) == 40
    assert {e.label for e in found["unsupervised"]} == {None}
    bad = [e for e in found["test"] if isinstance(e, BadExample)]
    assert len(bad) == 1 and "test/neg/0_7.txt" in bad[0].where and "0xe9" in bad[0].why
    for example in found["train"] + found["validation"]:
        _, label, name = example.text.removesuffix("<br />").split()
        assert example.label == {"neg": 0, "pos": 1}[label]
        assert example.id == f"train/{label}/{name}_7.txt"


def test_aclimdb_folder_given_itself_or_the_one_above(tmp_path: Path, read: Callable) -> None:
    above = open_source(f"aclimdb:{unpack(tmp_path, reviews())}")
    itself = open_source(f"aclimdb:{tmp_path}/aclImdb/")
    assert read(above, "train") == read(itself, "train")


@pytest.mark.parametrize("place", [pack, unpack])
def test_newsgroups(tmp_path: Path, read: Callable, place: Callable) -> None:
    members = posts() | {"20news-bydate-test/alt.other/1": b"x"}
    path = place(tmp_path / "20news.tar.gz" if place is pack else tmp_path / "d", members)
    source = open_source(f"newsgroups20:{path}")
    assert (source.splits, len(source.class_names)) == (("train", "validation", "test"), 20)
    test = read(source, "test")
    bad = [e for e in test if isinstance(e, BadExample)]
    assert len(bad) == 1 and "folder 'alt.other' is not one of alt.atheism" in bad[0].why
    assert sorted(e.label for e in test if e not in bad) == sorted(3 * list(range(20)))
    first = next(e for e in test if e not in bad and e.id.endswith("-test/sci.med/1"))
    assert first.text == "Subject: test sci.med 1\n\ncaf\u00e9"
    assert first.label == NEWSGROUPS.index("sci.med")
    assert len(read(source, "train") + read(source, "validation")) == 60


@pytest.mark.parametrize("end", ["\n", "\t"])
def test_a_thread_of_newsgroups_is_on_one_side(tmp_path: Path, read: Callable, end: str) -> None:
    answers = {
        f"20news-bydate-train/sci.med/{thread}0{i}": end.join(
            ["From: me", f"Subject: {'Re: ' * i}thread {thread}", "", f"answer {i}"]
        ).encode()
        for thread in range(100)
        for i in range(3)
    }
    source = open_source(f"newsgroups20:{pack(tmp_path / 'a.tar.gz', posts() | answers)}")
    sides = {
        split: [e.id for e in read(source, split) if "answer" in e.text]
        for split in ("train", "validation")
    }
    threads = {split: {name[:-2] for name in names} for split, names in sides.items()}
    assert not threads["train"] & threads["validation"]
    assert 0 < len(threads["validation"]) < 30
    assert sum(map(len, sides.values())) == 300


@pytest.mark.parametrize("place", [pack, unpack])
def test_folders_that_are_missing_are_all_named(tmp_path: Path, place: Callable) -> None:
    members = {
        n: d for n, d in posts().items() if "-test/sci.med" not in n and "rec.autos" not in n
    }
    path = place(tmp_path / "a.tar.gz" if place is pack else tmp_path / "d", members)
    with pytest.raises(InputError) as caught:
        open_source(f"newsgroups20:{path}")
    lines = [line.split(" has no documents of ")[1] for line in str(caught.value).splitlines()]
    found = [line.split(":")[0] for line in lines]
    assert found == ["rec.autos for train", "rec.autos for test", "sci.med for test"]


@pytest.mark.slow("reads 18,846 files; quick: some of the same kind")
def test_the_real_newsgroups_are_complete(read: Callable) -> None:
    path = SHARED / "newsgroups20" / "20news-bydate.tar.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    source = open_source(f"newsgroups20:{path}")
    found = {split: read(source, split) for split in source.splits}
    assert len(found["train"]) + len(found["validation"]) == 11_314
    assert len(found["test"]) == 7_532
    assert not [e for examples in found.values() for e in examples if isinstance(e, BadExample)]
    assert {e.label for e in found["test"]} == set(range(20))


@pytest.mark.parametrize("name", ["train/pos/9_9.txt", "test/neg/9_9.txt", "train/unsup/9_9.txt"])
def test_a_link_in_an_archive_is_one_bad_example(tmp_path: Path, read: Callable, name: str) -> None:
    path = pack(tmp_path / "a.tar.gz", reviews())
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        with tarfile.open(path) as source:
            for info in source:
                tar.addfile(info, source.extractfile(info))
        link = tarfile.TarInfo(f"aclImdb/{name}")
        link.type, link.linkname = tarfile.SYMTYPE, "0_7.txt"
        tar.addfile(link)
    source = open_source(f"aclimdb:{tmp_path}/b.tar")
    found = [e for split in source.splits for e in read(source, split)]
    links = [e for e in found if isinstance(e, BadExample) and "a link" in e.why]
    assert [e.where for e in links] == [f"{tmp_path}/b.tar, member aclImdb/{name}"]
