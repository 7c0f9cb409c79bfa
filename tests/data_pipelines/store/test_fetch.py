"""A token store at an address, fetched into a cache."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipelines import object_store
from data_pipelines.errors import InputError
from data_pipelines.object_store import ObjectStore
from data_pipelines.store import fetch
from data_pipelines.store.fetch import fetched
from data_pipelines.store.token_store import TokenStore
from tests.s3_server import needs_s3, s3_server


@pytest.fixture
def there(small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of a store, to be fetched from file://."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "RETRY_SECONDS", (0.05, 0.2))
    return shutil.copytree(small_store, tmp_path / "there")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_is_fetched_once_however_many_ask(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, download = [], ObjectStore.download

    def counted(store: ObjectStore, name: str, path: Path) -> None:
        names.append(name)
        download(store, name, path)

    monkeypatch.setattr(ObjectStore, "download", counted)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetched(f"file://{there}", print), range(4)))
    (folder,) = folders
    assert files_of(folder) == files_of(there)
    assert len(names) == len(set(names)) == len(files_of(there)) - 1  # but for the manifest
    TokenStore(folder).verify()


def test_an_interrupted_fetch_continues(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, download = [], ObjectStore.download

    def until_the_third(store: ObjectStore, name: str, path: Path) -> None:
        names.append(name)
        download(store, name, path)
        if len(names) == 3:
            path.write_bytes(path.read_bytes()[:-1])
            raise KeyboardInterrupt

    monkeypatch.setattr(ObjectStore, "download", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        fetched(f"file://{there}", print)
    assert files_of(fetched(f"file://{there}", print)) == files_of(there)
    assert sorted(set(names)) == sorted(files_of(there).keys() - {"manifest.json"})
    assert len(names) == len(set(names)) + 1  # the one that was cut off


def test_another_content_is_refused_and_not_kept(there: Path) -> None:
    data = bytearray((there / "vocab.txt").read_bytes())
    data[-2] ^= 1
    (there / "vocab.txt").write_bytes(data)
    with pytest.raises(InputError, match=f"--store=file://{there}: its vocab.txt is not the one"):
        fetched(f"file://{there}", print)
    assert not [path for path in fetch.cache_folder("stores").iterdir() if path.name.isalnum()]


def test_what_is_missing_or_cannot_be_written_is_named(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--store=file:///none cannot be fetched: No such file"):
        fetched("file:///none", print)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to another folder"):
        fetched(f"file://{there}", print)


@needs_s3
def test_a_server_that_fails_is_asked_again(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for path in there.iterdir():
            ObjectStore("s3://bucket/store").upload(path, path.name)
        kinds = ("slow_down", "error", "cut")
        server.fail_all([{"kind": k, "method": "GET", "part": "", "times": 2} for k in kinds])
        lines: list[str] = []
        assert files_of(fetched("s3://bucket/store", lines.append)) == files_of(there)
        assert any("trying again" in line for line in lines)
