"""Objects below an address such as s3://bucket/path, through fsspec; see files.py for drivers."""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.errors import InputError
from data_pipelines.files import EXTRAS, error_text

_Found = TypeVar("_Found")
# The drivers' modules, by scheme.
_MODULES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}


class StoreError(Exception):
    """The store did not do what it was asked to; trying again may help."""


class MissingError(StoreError):
    """The object, or the bucket, does not exist."""


class RefusedError(StoreError):
    """The store refuses these credentials, or there are none: trying again does not help."""


def address_fault(url: str) -> str:
    """Returns why no store can be opened at `url`, or "": without connecting to it."""
    scheme, separator, rest = url.partition("://")
    if not separator or not rest:
        return "must be an address such as s3://bucket/path"
    module = _MODULES.get(scheme)
    if module and importlib.util.find_spec(module) is None:
        return f"needs a driver for {scheme}://: pip install 'warmstate[{EXTRAS[scheme]}]'"
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        return f"needs a driver for {scheme}://: {error}"
    return ""


RETRY_SECONDS = (0.5, 60.0)  # first and longest pause; each is twice the one before


def pauses() -> Iterator[float]:
    """Yields the seconds to wait before each further try; they never end."""
    pause, longest = RETRY_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, longest)


def patiently(
    action: Callable[[], _Found], seconds: float, log: Callable[[str], None], what: str
) -> _Found:
    """Returns what `action` returns, and repeats it for so long while the store fails.

    Args:
        what: Named in the log line of the first failure.

    Raises:
        StoreError: At once if what was asked for is missing or refused.
    """
    limit, is_told = time.monotonic() + seconds, False
    for pause in pauses():
        try:
            return action()
        except (MissingError, RefusedError):
            raise
        except StoreError as error:
            if time.monotonic() + pause > limit:
                raise
            if not is_told:
                log(f"{what} fails ({error}); trying again for {seconds:g} s")
            is_told = True
            time.sleep(pause)
    raise AssertionError("pauses never end")


class ObjectStore:
    """The objects below an address. Every method raises StoreError if it fails.

    Args:
        url: For example s3://bucket/path. file:///folder is a folder, for trials.
    """

    def __init__(self, url: str):
        if fault := address_fault(url):
            raise InputError(f"{url} {fault}")
        self.url = url.rstrip("/")
        self._system: Any = None
        self._root = ""

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns the sizes in bytes of the objects in `folder`, by name, as they are now."""

        def listed(system: Any, path: str) -> dict[str, int]:
            system.invalidate_cache()
            found = system.find(path, detail=True)
            return {name[len(path) :].strip("/"): info["size"] for name, info in found.items()}

        try:
            return self._do(listed, folder)
        except MissingError:  # of a bucket that is missing, the next write tells
            return {}

    def read(self, name: str) -> bytes:
        """Returns an object's bytes."""
        return bytes(self._do(lambda system, path: system.cat_file(path), name))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Returns bytes [start, stop) of objects, given as (name, start, stop); all at once."""

        def read(system: Any, folder: str) -> list[bytes]:
            names, starts, stops = (list(each) for each in zip(*ranges, strict=True))
            paths = [folder + name for name in names]
            return system.cat_ranges(paths, starts, stops, on_error="raise")

        return self._do(read, "")

    def write(self, name: str, data: bytes) -> None:
        """Writes an object."""
        self._do(lambda system, path: system.pipe_file(path, data), name)

    def upload(self, file: str | Path, name: str) -> None:
        """Writes an object from a local file."""
        self._do(lambda system, path: system.put_file(str(file), path), name)

    def download(self, name: str, file: Path) -> None:
        """Writes an object to a local file, which is flushed to the disk."""
        self._do(lambda system, path: system.get_file(path, str(file)), name)
        with file.open("rb") as written:
            os.fsync(written.fileno())

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, those that exist."""
        for name in names:
            try:
                self._do(lambda system, path: system.rm_file(path), name)
            except MissingError:
                continue

    def _do(self, action: Callable[[Any, str], _Found], name: str) -> _Found:
        """Returns action(file system, path); drivers raise errors of many types."""
        try:
            if self._system is None:
                self._open()
            path = f"{self._root}/{name}"
            if "file" in self._system.protocol:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            return action(self._system, path)
        except FileNotFoundError as error:
            raise MissingError(error_text(error)) from error
        except Exception as error:
            refused = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
            raise (RefusedError if refused else StoreError)(error_text(error)) from error

    def _open(self) -> None:
        import fsspec

        for name in ("aiobotocore", "botocore"):  # which tell where they found the credentials
            logging.getLogger(name).setLevel(logging.WARNING)
        # As many as aiohttp's; s3fs's 10 are few for the documents of several batches.
        s3 = fsspec.config.conf.setdefault("s3", {}).setdefault("config_kwargs", {})
        s3.setdefault("max_pool_connections", 100)
        # An instance without a cache of listings, which another process may have outdated.
        system, root = fsspec.core.url_to_fs(
            self.url, use_listings_cache=False, skip_instance_cache=True
        )
        self._system, self._root = system, root.rstrip("/")
