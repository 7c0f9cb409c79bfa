import gzip
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines import files
from data_pipelines.errors import InputError

needs_zstandard = pytest.mark.skipif(
    importlib.util.find_spec("zstandard") is None, reason="the package zstandard is not installed"
)
TEXT = b"".join(b"line %d\n" % (i * i) for i in range(50_000))


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder with a.txt, b.gz and sub/c.txt: of this machine, and behind an address."""
    if request.param == "local":
        (tmp_path / "sub").mkdir()
        (tmp_path / "a.txt").write_bytes(TEXT)
        (tmp_path / "b.gz").write_bytes(gzip.compress(TEXT))
        (tmp_path / "sub" / "c.txt").write_bytes(b"c")
        yield str(tmp_path)
        return
    import tensorflow as tf

    root = "ram://test_files"  # TensorFlow's file system in memory
    tf.io.gfile.makedirs(f"{root}/sub")
    for name, data in {"a.txt": TEXT, "b.gz": gzip.compress(TEXT), "sub/c.txt": b"c"}.items():
        with tf.io.gfile.GFile(f"{root}/{name}", "wb") as file:
            file.write(data)
    yield root
    tf.io.gfile.rmtree(root)


def test_names(folder: str) -> None:
    assert files.find_files(f"{folder}/*") == [f"{folder}/a.txt", f"{folder}/b.gz"]
    assert files.find_files(f"{folder}/*.csv") == []
    assert files.walk(folder) == [f"{folder}/{name}" for name in ("a.txt", "b.gz", "sub/c.txt")]
    assert files.list_folder(folder) == ["a.txt", "b.gz", "sub"]
    assert files.list_folder(f"{folder}/none") == []
    assert files.is_dir(f"{folder}/sub") and not files.is_dir(f"{folder}/a.txt")
    assert files.is_file(f"{folder}/a.txt") and not files.is_file(f"{folder}/sub")
    assert not files.is_file(f"{folder}/none")
    assert files.size_bytes(f"{folder}/a.txt") == len(TEXT)


def test_contents(folder: str) -> None:
    with files.open_decompressed(f"{folder}/b.gz") as file:
        assert file.read() == TEXT
    with files.open_binary(f"{folder}/a.txt") as file:
        file.seek(len(TEXT) - 3)
        assert (file.read(), file.tell()) == (TEXT[-3:], len(TEXT))
        file.seek(5)
        assert file.readline() == TEXT[5:].split(b"\n")[0] + b"\n"
        assert file.seek(-2, io.SEEK_END) == len(TEXT) - 2


def test_a_file_that_is_missing_is_named(folder: str) -> None:
    with pytest.raises(InputError, match=f"{folder}/none cannot be opened"):
        files.open_binary(f"{folder}/none")


@pytest.mark.parametrize(
    "function", [files.find_files, files.walk, files.is_file, files.size_bytes, files.open_binary]
)
def test_an_address_that_nothing_can_open(function: Callable) -> None:
    with pytest.raises(InputError, match="nosuch://a/b cannot be .*: .*nosuch"):
        function("nosuch://a/b")


def test_a_name_with_the_signs_of_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.write_text("x")
    assert files.find_files(str(path)) == [str(path)]


def test_a_closed_gzip_closes_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x"))
    before = len(os.listdir("/proc/self/fd"))
    files.open_decompressed(str(tmp_path / "a.gz")).close()
    assert len(os.listdir("/proc/self/fd")) == before


@needs_zstandard
def test_zstd_in_several_frames(tmp_path: Path) -> None:
    import zstandard

    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.compress(TEXT) + zstandard.compress(b"more"))
    with files.open_decompressed(str(path)) as file:
        assert file.readline() == b"line 0\n"
        assert file.read() == TEXT[7:] + b"more"


@needs_zstandard
@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_zstd_that_is_cut_off_or_damaged(tmp_path: Path, cut: int) -> None:
    import zstandard

    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.compress(TEXT)[:-cut])
    with files.open_decompressed(str(path)) as file, pytest.raises(EOFError):
        file.read()
    path.write_bytes(b"no zstd")
    with files.open_decompressed(str(path)) as file, pytest.raises(OSError, match="zstd"):
        file.read()


def test_missing_zstandard_is_named(tmp_path: Path) -> None:
    # An interpreter without site-packages is one where the package is not installed.
    (tmp_path / "a.zst").write_bytes(b"x")
    program = "import sys; from data_pipelines import files; files.open_decompressed(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, str(tmp_path / "a.zst")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert "a.zst needs the package zstandard: pip install zstandard" in result.stderr
