"""Finds and opens files, local or at an address with `://`, plain or compressed.

Local paths need the standard library only. An address is read through fsspec, by the driver of its
scheme: http(s) needs aiohttp, s3 needs s3fs, gs needs gcsfs, az needs adlfs. Credentials follow the
driver's own rules.
"""

import glob
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from data_pipelines.errors import InputError

COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1 << 20
# The extra to install for a scheme.
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs", "az": "azure"}


def is_remote(path: str) -> bool:
    """Returns whether a path is an address with a scheme."""
    return "://" in path


def is_compressed(path: str) -> bool:
    """Returns whether the file's ending says that it is compressed."""
    return path.endswith(tuple(COMPRESSED))


def find_files(pattern: str) -> list[str]:
    """Returns the files that match a pattern (`*`, `?`, `[...]`, `**`), sorted.

    Raises:
        InputError: the address cannot be searched, or has no sign of a pattern and does not exist.
    """
    if is_remote(pattern):
        with _remote(pattern) as (system, name):
            if any(sign in name for sign in "*?[") and not system.isfile(name):
                found = system.glob(name, detail=True).values()
            else:
                found = [system.info(name)]
            return sorted(
                system.unstrip_protocol(info["name"]) for info in found if info["type"] == "file"
            )
    if os.path.isfile(pattern):  # a name that has one of the signs in it
        return [pattern]
    return sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))


def walk(folder: str) -> list[str]:
    """Returns all files below a folder, sorted; links to folders are not followed.

    Raises:
        InputError: the folder cannot be read.
    """
    if is_remote(folder):
        with _remote(folder) as (system, name):
            return sorted(map(system.unstrip_protocol, system.find(name)))
    try:
        steps = list(os.walk(folder, onerror=_raise))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error_text(error)}") from error
    return sorted(os.path.join(parent, name) for parent, _, names in steps for name in names)


def is_dir(path: str) -> bool:
    """Returns whether a path is a folder."""
    if is_remote(path):
        with _remote(path) as (system, name):
            return system.isdir(name)
    return os.path.isdir(path)


def is_file(path: str) -> bool:
    """Returns whether a path is a file."""
    if is_remote(path):
        with _remote(path) as (system, name):
            return system.isfile(name)
    return os.path.isfile(path)


def size_bytes(path: str) -> int:
    """Returns a file's size as stored.

    Raises:
        InputError: the address cannot be reached, or its server does not tell the size.
    """
    if not is_remote(path):
        return os.path.getsize(path)
    with _remote(path) as (system, name):
        size = system.size(name)
    if size is None:
        raise InputError(f"{path} cannot be read: its server does not tell its size")
    return size


def read_error(path: str, error: OSError, progress: str) -> InputError:
    """Returns the error for a file that cannot be read further, e.g. a truncated download.

    Args:
        progress: how far reading came, e.g. "after line 17".
    """
    message = error_text(error)
    cut = "is cut off" if "Truncated" in message else f"cannot be read ({message})"
    return InputError(f"{path} {cut} {progress}: fetch the file again")


def open_binary(path: str) -> BinaryIO:
    """Opens a file's bytes as they are stored, seekable.

    Raises:
        InputError: the file cannot be opened.
    """
    if is_remote(path):
        with _remote(path) as (system, name):
            return io.BufferedReader(_RemoteFile(system.open(name, "rb")), _BUFFER_BYTES)
    try:
        return open(path, "rb", buffering=_BUFFER_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error_text(error)}") from error


def open_decompressed(path: str) -> BinaryIO:
    """Opens a file and undoes the compression that its ending names: .gz, .tgz or .zst.

    A compressed file cannot seek.

    Raises:
        InputError: the file cannot be opened. Reading raises OSError if the file is damaged or
            truncated.
    """
    file = open_binary(path)
    codec = COMPRESSED.get(os.path.splitext(path)[1])
    if codec is None:
        return file
    import pyarrow

    # Unlike the readers of zstandard it reports a truncated file. A larger buffer would lose more
    # of what precedes the damage.
    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec)
    return io.BufferedReader(stream, io.DEFAULT_BUFFER_SIZE)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors, which differ from driver to driver, become OSError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:
            raise OSError(error_text(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _remote(path: str) -> Iterator[tuple[Any, str]]:
    """Gives the file system of an address, and the name by which that knows it.

    Raises:
        InputError: the driver is missing, or what is done inside fails: drivers raise errors of
            many types.
    """
    import fsspec

    scheme = path.partition("://")[0]
    try:
        yield fsspec.core.url_to_fs(path)
    except ImportError as error:
        hint = f"pip install 'warmstate[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        raise InputError(f"{path} needs a driver for {scheme}://: {hint}") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read: {error_text(error)}") from error


def error_text(error: BaseException) -> str:
    """Returns an error's text without its number and path."""
    if isinstance(error, FileNotFoundError) and not error.strerror:  # fsspec's
        return str(error.__cause__ or "it does not exist")
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _raise(error: Exception) -> None:
    raise error
