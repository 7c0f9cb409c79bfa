"""What is at an address, fetched into a cache: once a node, whatever its workers.

CACHE/warmstate/stores/DIGEST     CACHE is $XDG_CACHE_HOME or ~/.cache; DIGEST of the manifest
CACHE/warmstate/stores-BYTES/DIGEST   the same without some files of tokens
CACHE/warmstate/bundles/DIGEST    DIGEST of NAME.json; see `trainer.inference.hub`
"""

import fcntl
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.durable import flush_folder, write_file
from data_pipelines.errors import InputError
from data_pipelines.object_store import ObjectStore, StoreError, patiently
from data_pipelines.store.manifest import kinds_of, read_manifest, shards_of

RETRY_SECONDS = 120.0  # for a store that does not answer, anew for each file
Log = Callable[[str], None]


class Fetching:
    """What is at `url`, while it is fetched to `folder`."""

    def __init__(self, url: str, log: Log):
        self._store, self._log = ObjectStore(url), log
        self.url, self.folder = self._store.url, Path()

    def read(self, name: str) -> bytes:
        """Returns an object's bytes."""
        what = f"{self.url}/{name}"
        return patiently(lambda: self._store.read(name), RETRY_SECONDS, self._log, what)

    def download(self, name: str) -> Path:
        """Writes an object to the folder; returns its path."""
        path, what = self.folder / name, f"{self.url}/{name}"
        patiently(lambda: self._store.download(name, path), RETRY_SECONDS, self._log, what)
        return path


def cache_folder(kind: str) -> Path:
    """Returns the folder below which "stores" or "bundles" are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "warmstate" / kind


def fetched(url: str, log: Log, most_bytes: int = 0) -> Path:
    """Returns the folder of the token store at `url`, fetched if the cache lacks it.

    Every file's size and SHA-256 are compared with the manifest.

    Args:
        most_bytes: What the folder may hold; 0 for everything. The tokens of the shards that would
            exceed it stay at `url`; see `TokenStore`.

    Raises:
        InputError: The store cannot be fetched, is damaged, or the cache cannot be written, or
            `most_bytes` are too few for the other files.
    """
    kind = f"stores-{most_bytes}" if most_bytes else "stores"
    fetch = functools.partial(_fetch_store, most_bytes=most_bytes)
    return cached(url, kind, "manifest.json", fetch, log, f"--store={url}")


def cached(
    url: str,
    kind: str,
    description: str,
    fetch: Callable[[Fetching], None],
    log: Log,
    what: str,
) -> Path:
    """Returns the folder of what is at `url`, fetched if the cache lacks it.

    Processes may call this at once; the others wait for the first. A fetch that was interrupted
    continues.

    Args:
        kind: The folder's name below `cache_folder`.
        description: The object that names all others by digest. It is in the folder already when
            `fetch` is called.
        fetch: Downloads and compares the others; raises InputError if they are not those.
        what: Names it in errors.

    Raises:
        InputError: It cannot be fetched, is damaged, or the cache cannot be written.
    """
    try:
        fetching = Fetching(url, log)
        data = fetching.read(description)
        folder = cache_folder(kind) / hashlib.sha256(data).hexdigest()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                log(f"data: fetching {url} to {folder}")
                fetching.folder = beside = Path(f"{folder}.building")
                beside.mkdir(exist_ok=True)
                write_file(beside / description, [data])
                fetch(fetching)
                flush_folder(beside)
                beside.rename(folder)
                flush_folder(folder.parent)
    except StoreError as error:
        raise InputError(f"{what} cannot be fetched: {error}") from error
    except OSError as error:
        raise InputError(
            f"{what}: its cache {cache_folder(kind)} cannot be written: {error.strerror}: make "
            "room, or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _fetch_store(fetching: Fetching, most_bytes: int) -> None:
    manifest = read_manifest(fetching.folder)  # refuses names outside of the folder
    files: dict[str, dict[str, Any]] = {"vocab.txt": manifest["vocab_file"]}
    tokens: dict[str, dict[str, Any]] = {}
    for shard in shards_of(manifest):
        for kind in kinds_of(manifest):
            named = tokens if kind == "tokens" else files
            named[f"{shard['name']}.{kind}"] = shard["files"][kind]
    size = sum(entry["bytes"] for entry in files.values())
    if 0 < most_bytes < size:
        raise InputError(
            f"--store_cache_bytes={most_bytes} is too small for {fetching.url}: its vocabulary, "
            f"offsets and labels have {size} bytes"
        )
    for name, entry in tokens.items():
        size += entry["bytes"]
        if 0 < most_bytes < size:
            break
        files[name] = entry
    for name, entry in files.items():
        path = fetching.folder / name
        if not _is_whole(path, entry["sha256"]) and not _is_whole(
            fetching.download(name), entry["sha256"]
        ):
            path.unlink(missing_ok=True)
            raise InputError(
                f"--store={fetching.url}: its {name} is not the one that its manifest names: copy "
                "the store there again"
            )


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
