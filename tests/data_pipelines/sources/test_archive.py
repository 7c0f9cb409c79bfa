import gzip
import io
import re
import subprocess
import sys
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
    found = list(data_set.parse(re.compile(r"\.txt$").search, contents, True))
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
    assert list(Archive(str(path)).parse(re.compile("txt").search, contents, True)) == [
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


def header(name: str, kind: bytes, size: int) -> bytes:
    """Returns a member's header with a size as `tarfile` would never write it."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    # A number of 12 bytes; the first says that it is binary, and negative if all its bits are set.
    block[124:136] = (size % 2**96).to_bytes(12, "big")
    block[124] = 0xFF if size < 0 else 0x80
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(size: str) -> bytes:
    record = f"size={size}\n"
    record = f"{len(record) + 3} {record}"
    data = record.encode().ljust(512, b"\0")
    return header("pax", tarfile.XHDTYPE, len(record)) + data + header("a", tarfile.REGTYPE, 0)


HOSTILE = {
    "a negative size": header("a", tarfile.REGTYPE, -1024),
    "a negative size of a pax header": header("a", tarfile.XHDTYPE, -1024),
    "a negative size of a long name": header("a", tarfile.GNUTYPE_LONGNAME, -1024),
    "a negative size in a pax header": pax("-2048"),
    "a pax header of 200 MB": header("a", tarfile.XHDTYPE, 200 << 20),
    "a long name of 200 MB": header("a", tarfile.GNUTYPE_LONGNAME, 200 << 20),
    "20,000 pax headers": header("a", tarfile.XHDTYPE, 0) * 20_000,
    "20,000 long names": (header("a", tarfile.GNUTYPE_LONGNAME, 1) + bytes(512)) * 20_000,
    "a sparse file with many holes": header("a", tarfile.GNUTYPE_SPARSE, 0)[:482]
    + b"\1"
    + bytes(29)
    + (b"0" * 504 + b"\1" + bytes(7)) * 20_000,
}
OPEN = """
import resource, sys
from data_pipelines.errors import InputError
from data_pipelines.sources.archive import Archive
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Archive(sys.argv[1])
except InputError as error:
    print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "memory"
"""


@pytest.mark.seconds
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers_are_refused_in_bounded_time_and_memory(
    tmp_path: Path, what: str, ending: str
) -> None:
    good = make_tar(tmp_path / "good.tar", {"good.txt": b"x"}).read_bytes()[:1024]
    data = good + HOSTILE[what] + bytes(250 << 20 if "200 MB" in what else 1 << 20)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(data, 1) if ending == ".tar.gz" else data)
    result = subprocess.run(
        [sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"(damaged|cut off).* after member (good\.txt|a)[: ]", result.stdout), (
        result.stdout
    )
