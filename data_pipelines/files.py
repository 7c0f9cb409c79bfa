"""Reading files, local or at an address with `://` (gs://, s3://, hdfs://), plain or compressed.

Local paths need the standard library only; the others go through `tf.io.gfile`, which is imported
at the first of them.
"""

import functools
import glob
import gzip
import importlib.util
import io
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from data_pipelines.errors import InputError

T = TypeVar("T")
# What reading a damaged, cut off or unreadable file raises; zstd's own error becomes OSError.
READ_ERRORS = (OSError, EOFError, zlib.error)
COMPRESSED = (".gz", ".tgz", ".zst")
_BUFFER_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Returns whether a path is an address that only `tf.io.gfile` can read."""
    return "://" in path


def is_compressed(path: str) -> bool:
    """Returns whether the file's ending says that it is compressed."""
    return path.endswith(COMPRESSED)


def find_files(pattern: str) -> list[str]:
    """Returns the files that match a pattern (`*`, `?`, `[...]`, local also `**`), sorted.

    Raises:
        InputError: the address cannot be searched.
    """
    if is_remote(pattern):
        return _remote(pattern, lambda gfile: _not_folders(gfile, gfile.glob(pattern)))
    if os.path.isfile(pattern):  # a name that has one of the signs in it
        return [pattern]
    return sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))


def _not_folders(gfile: Any, paths: list[str]) -> list[str]:
    return sorted(path for path in paths if not gfile.isdir(path))


def walk(folder: str) -> list[str]:
    """Returns all files below a folder, sorted; links to folders are not followed.

    Raises:
        InputError: the folder cannot be read.
    """
    if is_remote(folder):
        steps = _remote(folder, lambda gfile: list(gfile.walk(folder, onerror=_raise)))
    else:
        try:
            steps = list(os.walk(folder, onerror=_raise))
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {_message(error)}") from error
    return sorted(os.path.join(parent, name) for parent, _, names in steps for name in names)


def list_folder(path: str) -> list[str]:
    """Returns the names in a folder, sorted, without a trailing slash; [] where there is none."""
    if not is_dir(path):
        return []
    names = _remote(path, lambda g: g.listdir(path)) if is_remote(path) else os.listdir(path)
    return sorted(name.rstrip("/") for name in names)


def is_dir(path: str) -> bool:
    """Returns whether a path is a folder."""
    return _remote(path, lambda g: g.isdir(path)) if is_remote(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
    """Returns whether a path is a file."""
    if is_remote(path):
        return _remote(path, lambda gfile: gfile.exists(path) and not gfile.isdir(path))
    return os.path.isfile(path)


def size_bytes(path: str) -> int:
    """Returns a file's size as stored."""
    if is_remote(path):
        return _remote(path, lambda gfile: gfile.stat(path).length)
    return os.path.getsize(path)


def read_error(path: str, error: BaseException, progress: str) -> InputError:
    """Returns the error for a file that cannot be read on, e.g. a download that was cut off.

    Args:
        path: the file.
        error: one of `READ_ERRORS`.
        progress: how far reading came, e.g. "after line 17".
    """
    cut = "is cut off" if isinstance(error, EOFError) else f"cannot be read ({_message(error)})"
    return InputError(f"{path} {cut} {progress}: fetch the file again")


def open_binary(path: str) -> BinaryIO:
    """Opens a file's bytes as they are stored; the file can seek.

    Raises:
        InputError: the file cannot be opened.
    """
    try:
        if is_remote(path):
            return io.BufferedReader(_RemoteFile(path), _BUFFER_BYTES)
        return open(path, "rb", buffering=_BUFFER_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {_message(error)}") from error


def open_decompressed(path: str) -> BinaryIO:
    """Opens a file and undoes the compression that its ending names: .gz, .tgz or .zst.

    Raises:
        InputError: the file cannot be opened, or the package for its compression is missing.
            Reading raises one of `READ_ERRORS` where the file is damaged or cut off.
    """
    fault = compression_fault(path)
    if fault:
        raise InputError(fault)
    file = open_binary(path)
    if path.endswith((".gz", ".tgz")):
        # Not in a larger buffer: it would lose what comes before a file's end that is cut off.
        return cast(BinaryIO, _OwningGzip(file))  # it has all the methods, if not the name
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(file), _BUFFER_BYTES)
    return file


def compression_fault(path: str) -> str:
    """Returns why a file's compression cannot be undone on this machine, or ""."""
    if path.endswith(".zst") and importlib.util.find_spec("zstandard") is None:
        return f"{path} needs the package zstandard: pip install zstandard"
    return ""


class _OwningGzip(gzip.GzipFile):
    """A gzip reader that closes the file below it, too."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _ZstdFile(io.RawIOBase):
    """All frames of a zstd file; unlike zstandard's own reader it notices one that is cut off."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: zstandard.ZstdDecompressionObj | None = None  # that is being read
        self._input = b""  # read, but not yet given to a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._input or self._file.read(1 << 16)
            self._input = b""
            if not data and self._frame is not None:
                raise EOFError("the last zstd frame is cut off")
            if not data:
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        self._frame = self._frame or self._new_frame()
        try:
            text = self._frame.decompress(data)
        except self._error as error:
            raise OSError(f"damaged zstd data: {error}") from error
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
        return text

    def close(self) -> None:
        self._file.close()
        super().close()


class _RemoteFile(io.RawIOBase):
    """`tf.io.gfile.GFile` as a file of the standard library; its errors become OSError."""

    def __init__(self, path: str) -> None:
        self._file = _gfile().GFile(path, "rb")
        self._length = self._call(lambda: _gfile().stat(path).length)

    def _call(self, function: Any) -> Any:
        try:
            return function()
        except _remote_errors() as error:
            raise OSError(_message(error)) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._call(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell, io.SEEK_END: self._length}[whence]
        target = offset + (base() if callable(base) else base)
        self._call(lambda: self._file.seek(target))
        return target

    def tell(self) -> int:
        return self._call(self._file.tell)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _remote(path: str, function: Callable[[Any], T]) -> T:
    """Returns function(tf.io.gfile).

    Raises:
        InputError: the address cannot be reached, or nothing here knows its scheme.
    """
    try:
        return function(_gfile())
    except _remote_errors() as error:
        raise InputError(f"{path} cannot be read: {_message(error)}") from error


@functools.cache
def _gfile() -> Any:
    from data_pipelines.quiet_tensorflow import import_quietly

    import_quietly()
    import tensorflow as tf

    return tf.io.gfile


def _remote_errors() -> type[Exception]:
    import tensorflow as tf

    return tf.errors.OpError


def _message(error: BaseException) -> str:
    """Returns an error's text without its number and path."""
    return getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)


def _raise(error: Exception) -> None:
    raise error
