import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample
from data_pipelines.sources.archive import Archive


def contents(name: str, where: str, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    yield name, file.read()


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "a.tar", "a.tar.gz", "a.tgz"])
def data_set(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    members = {"./d/b.txt": b"b" * 512, "./d/a.txt": b"", "./c.bin": b"c" * 700}
    if request.param != "folder":
        mode = "w" if request.param == "a.tar" else "w:gz"
        return Archive(str(make_tar(tmp_path / request.param, members, mode)))
    for name, data in members.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Archive(f"{tmp_path}/folder/")


def test_a_folder_and_archives_read_alike(data_set: Archive) -> None:
    assert sorted(data_set.names) == ["c.bin", "d/a.txt", "d/b.txt"]
    found = list(data_set.read(r"\.txt$", contents))
    assert sorted(found) == [("d/a.txt", b""), ("d/b.txt", b"b" * 512)]
    assert [name for name, _ in found] == [n for n in data_set.names if n.endswith(".txt")]
    data_set.require({"the texts": r"\.txt$"})
    with pytest.raises(InputError, match="has no labels\n.* has no more") as caught:
        data_set.require({"labels": "label", "texts": "txt", "more": "more"})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "d/../../a"])
def test_names_that_lead_out_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = make_tar(tmp_path / "a.tar", {"good": b"x", name: b"x"})
    with pytest.raises(InputError, match=r"a\.tar: member '.*' leads out of the archive"):
        Archive(str(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_told_and_not_followed(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    path = make_tar(tmp_path / "a.tar", {"a.txt": b"a"})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.txt")
        info.type, info.linkname = kind, str(tmp_path / "secret.txt")
        tar.addfile(info)
    assert list(Archive(str(path)).read("txt", contents)) == [
        ("a.txt", b"a"),
        BadExample(f"{path}, member b.txt", "a link or a device, not a file"),
    ]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
def test_archives_that_are_cut_off(tmp_path: Path, ending: str, keep: float) -> None:
    members = {f"{i}.txt": str(i**9).encode() * 50 for i in range(200)}
    path = make_tar(tmp_path / f"a{ending}", members, "w" if ending == ".tar" else "w:gz")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"(cut off|damaged).* after member \d+\.txt"):
        Archive(str(path))


def damage_header(data: bytearray) -> None:
    data[2 * 1024 + 100] ^= 0xFF


def cut_at_a_header(data: bytearray) -> None:
    del data[3 * 1024 :]


def no_tar(data: bytearray) -> None:
    data[:] = b"no tar" * 999


def nothing(data: bytearray) -> None:
    data.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_header, r"damaged after member 1: what follows is not tar"),
        (cut_at_a_header, "cut off after member 2"),
        (no_tar, "damaged or cut off at its first member"),
        (nothing, "damaged or cut off at its first member"),
    ],
)
def test_damage_that_tarfile_would_take_for_the_end(
    tmp_path: Path, damage: Callable, message: str
) -> None:
    path = make_tar(tmp_path / "a.tar", {str(i): b"x" for i in range(9)})
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        Archive(str(path))


def test_a_member_name_that_is_not_utf8_is_written_out(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {"caf\udce9.txt": b"x"})
    assert Archive(str(path)).names == [r"caf\udce9.txt"]


@pytest.mark.parametrize("name", ["missing", "missing.tar.gz"])
def test_missing_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=name):
        Archive(str(tmp_path / name))
