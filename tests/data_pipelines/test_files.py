import gzip
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from data_pipelines import files
from data_pipelines.errors import InputError

TEXT = b"".join(b"line %d\n" % (i * i) for i in range(50_000))


@pytest.fixture(params=["local", "memory", "http"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, web: Callable[[Path], str]
) -> Iterator[str]:
    """A folder with a.txt, b.gz and sub/c.txt: on this machine, and at addresses."""
    contents = {"a.txt": TEXT, "b.gz": gzip.compress(TEXT), "sub/c.txt": b"c"}
    if request.param == "memory":
        import fsspec

        system = fsspec.filesystem("memory")
        for name, data in contents.items():
            system.pipe(f"/test_files/{name}", data)
        yield "memory:///test_files"
        system.rm("/test_files", recursive=True)
        return
    (tmp_path / "sub").mkdir()
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    yield str(tmp_path) if request.param == "local" else web(tmp_path)


def test_names(folder: str) -> None:
    assert files.find_files(f"{folder}/*.*") == [f"{folder}/a.txt", f"{folder}/b.gz"]
    assert files.find_files(f"{folder}/*.csv") == []
    assert files.find_files(f"{folder}/a.txt") == [f"{folder}/a.txt"]
    assert files.walk(folder) == [f"{folder}/{name}" for name in ("a.txt", "b.gz", "sub/c.txt")]
    assert files.is_dir(f"{folder}/sub") and not files.is_dir(f"{folder}/a.txt")
    assert files.is_file(f"{folder}/a.txt") and not files.is_file(f"{folder}/none")
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
    with pytest.raises(InputError, match=f"{folder}/none cannot be (opened|read)"):
        files.open_binary(f"{folder}/none")


@pytest.mark.parametrize(
    "function", [files.find_files, files.walk, files.is_file, files.size_bytes, files.open_binary]
)
def test_an_address_that_nothing_can_open(function: Callable) -> None:
    with pytest.raises(InputError, match="nosuch://a/b cannot be .*: .*nosuch"):
        function("nosuch://a/b")


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/a.csv cannot be read: .*connect"):
        files.find_files("http://127.0.0.1:9/a.csv")


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(path: str) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r"gs://a/b needs a driver for gs://: .*warmstate\[gcs\]"):
        files.find_files("gs://a/b")


def test_a_download_that_breaks_off_is_named(tmp_path: Path, web: Callable[..., str]) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    address = web(tmp_path, break_off_after=1000)
    with files.open_binary(f"{address}/a.txt") as file, pytest.raises(OSError, match=".+"):
        file.read()


@pytest.mark.parametrize("cut", [1, 8, 5000])
@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_truncated_or_damaged_file_at_an_address(
    tmp_path: Path, web: Callable[..., str], ending: str, cut: int
) -> None:
    compress = gzip.compress if ending == "gz" else zstandard.compress
    (tmp_path / f"a.{ending}").write_bytes(compress(TEXT)[:-cut])
    path = f"{web(tmp_path)}/a.{ending}"
    with files.open_decompressed(path) as file, pytest.raises(OSError, match="Truncated") as error:
        file.read()
    assert "is cut off" in str(files.read_error(path, error.value, "at its end"))
    (tmp_path / f"a.{ending}").write_bytes(b"not compressed")
    with files.open_decompressed(path) as file, pytest.raises(OSError, match=r"zlib|ZSTD"):
        file.read()


def test_a_name_with_the_signs_of_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.write_text("x")
    assert files.find_files(str(path)) == [str(path)]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_closing_a_compressed_file_closes_the_file(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(b"x"))
    before = len(os.listdir("/proc/self/fd"))
    files.open_decompressed(str(tmp_path / f"a.{ending}")).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_zstd_in_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.compress(TEXT) + zstandard.compress(b"more"))
    with files.open_decompressed(str(path)) as file:
        assert file.readline() == b"line 0\n"
        assert file.read() == TEXT[7:] + b"more"
