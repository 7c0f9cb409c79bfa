"""A token store at an address, fetched into a cache: once a node, whatever its workers.

CACHE/warmstate/stores/DIGEST     CACHE is $XDG_CACHE_HOME or ~/.cache; DIGEST of the manifest
"""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from data_pipelines.durable import flush_folder, write_file
from data_pipelines.errors import InputError
from data_pipelines.object_store import ObjectStore, StoreError, patiently
from data_pipelines.store.manifest import kinds_of, read_manifest, shards_of

RETRY_SECONDS = 120.0  # for a store that does not answer, anew for each file


def cache_folder() -> Path:
    """Returns the folder below which stores are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "warmstate" / "stores"


def fetched(url: str, log: Callable[[str], None]) -> Path:
    """Returns the folder of the token store at `url`, fetched if the cache lacks it.

    Every file's size and SHA-256 are compared with the manifest. Processes may call this at once;
    the others wait for the first. A fetch that was interrupted continues.

    Raises:
        InputError: The store cannot be fetched, is damaged, or the cache cannot be written.
    """
    where = f"--store={url}"
    store = ObjectStore(url)
    try:
        data = patiently(lambda: store.read("manifest.json"), RETRY_SECONDS, log, where)
        folder = cache_folder() / hashlib.sha256(data).hexdigest()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                log(f"data: fetching {url} to {folder}")
                _fetch(store, data, folder, log)
    except StoreError as error:
        raise InputError(f"{where} cannot be fetched: {error}") from error
    except OSError as error:
        raise InputError(
            f"{where}: its cache {cache_folder()} cannot be written: {error.strerror}: make room, "
            "or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _fetch(store: ObjectStore, data: bytes, folder: Path, log: Callable[[str], None]) -> None:
    beside = Path(f"{folder}.building")
    beside.mkdir(exist_ok=True)
    write_file(beside / "manifest.json", [data])
    manifest = read_manifest(beside)  # refuses names outside of the folder
    files = {"vocab.txt": manifest["vocab_file"]}
    for shard in shards_of(manifest):
        files |= {f"{shard['name']}.{kind}": shard["files"][kind] for kind in kinds_of(manifest)}
    for name, entry in files.items():
        path = beside / name
        if not _is_whole(path, entry["sha256"]):
            what = f"{store.url}/{name}"
            patiently(lambda n=name, p=path: store.download(n, p), RETRY_SECONDS, log, what)  # type: ignore[misc]
            if not _is_whole(path, entry["sha256"]):
                path.unlink(missing_ok=True)
                raise InputError(
                    f"--store={store.url}: its {name} is not the one that its manifest names: "
                    "copy the store there again"
                )
    flush_folder(beside)
    beside.rename(folder)
    flush_folder(folder.parent)


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
