"""Files and folders that survive a crash or a power failure while they are written.

All are written beside their place, flushed to the disk and renamed, and the folder is flushed. So
a reader finds the old content or the new one, and what a call returned for is on the disk.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

Buffer = bytes | np.ndarray
PIECE_BYTES = 1 << 20  # between two pauses of a writer that has time
DISCARDED = "removed.old"
_AT_FDCWD, _EXCHANGE = -100, 2  # of renameat2(2)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def write_file(path: Path, blocks: Iterable[bytes]) -> dict[str, Any]:
    """Writes a file under another name and renames it to `path`.

    Two processes may write the same file.

    Returns:
        Its `bytes` and `sha256`, as manifests record them.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    digest, size = hashlib.sha256(), 0
    with _renamed(temporary, path, "xb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yields a new text file, which becomes `path` if the block ends without an error."""
    beside = path.with_name(path.name + ".new")
    remove(beside)  # left by a killed writer, or a link to a file of somebody else
    with _renamed(beside, path, "x", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def _renamed(beside: Path, path: Path, mode: str, **text: str) -> Iterator[IO[Any]]:
    """Yields the new file `beside`, which becomes `path` if the block ends without an error."""
    try:
        with beside.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    flush_folder(path.parent)


def write_new(path: Path, parts: Sequence[Buffer], pause: Callable[[], None] | None = None) -> None:
    """Writes a new file from parts, and flushes it to the disk but not its name.

    Args:
        pause: Is called after every PIECE_BYTES.
    """
    with path.open("xb") as file:
        for part in parts:
            for piece in pieces(part):
                file.write(piece)
                if pause:
                    pause()
        file.flush()
        os.fsync(file.fileno())


def pieces(buffer: Buffer) -> Iterator[memoryview]:
    """Yields a buffer (bytes, or uint8 [bytes]) in pieces of at most PIECE_BYTES."""
    whole: Any = buffer
    for start in range(0, len(buffer), PIECE_BYTES):
        yield memoryview(whole)[start : start + PIECE_BYTES]


def write_folder(
    new: Path,
    folder: Path,
    files: Mapping[str, bytes | Sequence[Buffer]],
    pause: Callable[[], None] | None = None,
) -> None:
    """Writes files (bytes or parts by name) to `new`, which then takes the place of `folder`.

    `folder` may exist: the two are exchanged in one operation where the file system has it. Where
    not, a crash between two renames leaves .NAME.replaced, which the next write puts back first.
    """
    replaced = folder.with_name(f".{folder.name}.replaced")
    if os.path.lexists(replaced) and not os.path.lexists(folder):
        replaced.rename(folder)
    remove(new)  # left by a killed writer
    make_folder(new)
    for name, data in files.items():
        write_new(new / name, [data] if isinstance(data, bytes) else data, pause)
    flush_folder(new)
    if not os.path.lexists(folder):
        new.rename(folder)
    elif not _exchanged(new, folder):
        remove(replaced)
        folder.rename(replaced)
        new.rename(folder)
    flush_folder(folder.parent)
    with suppress(OSError):  # the new folder is in its place; the next write removes the rest
        remove(new)
        remove(replaced)


def flush_file(path: Path) -> None:
    """Flushes a file and its name to the disk."""
    _flush(path, os.O_RDONLY | os.O_NOFOLLOW)
    flush_folder(path.parent)


def put_in_place(written: Path, path: Path) -> None:
    """Flushes a file or folder that another program has written, and renames it to `path`."""
    for folder, _, names in os.walk(written) if written.is_dir() else ():
        for name in names:
            _flush(Path(folder, name), os.O_RDONLY)
        flush_folder(Path(folder))
    if not written.is_dir():
        _flush(written, os.O_RDONLY)
    written.rename(path)
    flush_folder(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names in one operation; returns False where that is not supported."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:  # a C library without it
        return False
    if not exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, if they are missing."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Flushes the names in `folder` to the disk, without which a rename is not safe.

    Some file systems (FUSE, CIFS) refuse it, and so does a folder that may be written but not read;
    there is no other way to flush names there.
    """
    try:
        _flush(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EACCES):
            raise


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Removes a folder, which is called DISCARDED before the first of its files is gone."""
    aside = folder.with_name(DISCARDED)
    remove(aside)  # left by a killed process
    folder.rename(aside)
    remove(aside)
