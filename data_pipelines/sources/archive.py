"""A data set's files in a folder, or in a tar archive that is read without unpacking it."""

import contextlib
import functools
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar, cast

from data_pipelines import files
from data_pipelines.errors import InputError, raise_if
from data_pipelines.sources.source import BadExample

T = TypeVar("T")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
MAX_HEADER_BYTES = 1 << 20  # of one member: real ones have a few kilobytes
# Takes a file's name, its place for messages, and its open bytes.
Parser = Callable[[str, str, BinaryIO], Iterator[T]]


class Archive:
    """A folder or a tar archive (.tar, .tar.gz, .tgz, .tar.zst).

    Attributes:
        path: the folder or the archive.
        names: the files' names: a folder's sorted, an archive's in its order.

    Raises:
        InputError: the folder or archive is missing, or the archive is damaged: opening reads it
            to its end once.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        self.is_tar = path.endswith(TAR_ENDINGS)
        if not path:
            raise InputError("names no folder and no tar archive")
        if self.is_tar:
            if not files.is_file(self.path):
                raise InputError(f"{self.path} is missing")
            with _open_tar(self.path) as members:
                self.names = [name for name, _ in members]
        elif files.is_dir(self.path):
            self.names = [name[len(self.path) + 1 :] for name in files.walk(self.path)]
        else:
            raise InputError(f"{path} is neither a folder nor one of *{', *'.join(TAR_ENDINGS)}")

    def require(self, wanted: dict[str, str]) -> None:
        """Checks that each pattern matches a file.

        Args:
            wanted: regular expressions, by a name for messages.

        Raises:
            InputError: files are missing, one line each.
        """
        missing = [
            f"{self.path} has no {what}"
            for what, pattern in wanted.items()
            if not any(re.search(pattern, name) for name in self.names)
        ]
        raise_if(missing)

    def parse(
        self, wanted: Callable[[str], object], parse: Parser[T], report_links: bool
    ) -> Iterator[T | BadExample]:
        """Yields what `parse` yields for each wanted file, in the order of `names`.

        Args:
            wanted: from a name to a true value if the file is wanted.
            report_links: whether wanted links of an archive, which are not followed, are bad
                examples. One split reports them when several share the files.

        Raises:
            InputError: a file cannot be read, or the archive is damaged, cut off, or has a member
                whose name leads out of it.
        """
        if not self.is_tar:
            yield from self.parse_files([name for name in self.names if wanted(name)], parse)
            return
        with _open_tar(self.path) as members:
            for name, open_file in members:
                if not wanted(name):
                    continue
                where = f"{self.path}, member {name}"
                if file := open_file():
                    yield from parse(name, where, file)
                elif report_links:
                    yield BadExample(where, "a link or a device, not a file")

    def parse_files(self, names: list[str], parse: Parser[T]) -> Iterator[T]:
        """Yields what `parse` yields for each of these files of a folder."""
        for name in names:
            path = f"{self.path}/{name}"
            try:
                with files.open_decompressed(path) as file:
                    yield from parse(name, path, file)
            except OSError as error:
                raise files.read_error(path, error, "before its end") from error


@contextlib.contextmanager
def _open_tar(path: str) -> Iterator[Iterator[tuple[str, Callable[[], BinaryIO | None]]]]:
    """Gives an archive's members, without folders: names, and functions that open them.

    A function returns None for a link or a device. Each member is opened before the next is read.
    """
    progress = "at its first member"

    def members() -> Iterator[tuple[str, Callable[[], BinaryIO | None]]]:
        nonlocal progress
        while (info := _next_member(tar, forward)) is not None:
            name = _member_name(info.name, path)
            progress = f"after member {name}"
            if not info.isdir():
                yield name, functools.partial(_open_member, tar, info)
        _check_end(forward, path, progress)

    try:
        with files.open_decompressed(path) as file:
            forward = _Forward(file)
            with tarfile.open(fileobj=cast(BinaryIO, forward), mode="r:") as tar:
                yield members()
    except (tarfile.TarError, RecursionError) as error:
        raise InputError(f"{path} is damaged or cut off {progress} ({error})") from error
    except OSError as error:
        raise files.read_error(path, error, progress) from error


class _Forward:
    """A file for `tarfile`, read from front to back, that limits the bytes of a header.

    `tarfile` trusts the sizes in headers: a negative one makes it go back for ever (CVE-2025-8194),
    a large one fills the memory, a long chain of headers the stack.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self.header_bytes_left: int | None = MAX_HEADER_BYTES  # None: this is not a header
        self.last = b""  # the bytes read last

    def read(self, size: int) -> bytes:
        if self.header_bytes_left is not None:
            if not 0 <= size <= self.header_bytes_left:
                raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES:,} bytes")
            self.header_bytes_left -= size
        self.last = self._file.read(size)
        self._position += len(self.last)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a member of negative size")
        while self._position < position:
            data = self._file.read(min(position - self._position, 1 << 20))
            self._position += len(data)
            if not data:
                return  # `tarfile` finds that a byte is missing

    def tell(self) -> int:
        return self._position


def _next_member(tar: tarfile.TarFile, file: _Forward) -> tarfile.TarInfo | None:
    file.header_bytes_left = MAX_HEADER_BYTES
    info = tar.next()
    file.header_bytes_left = None
    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
    return info


def _open_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> BinaryIO | None:
    return cast(BinaryIO, tar.extractfile(info)) if info.isreg() else None


def _member_name(name: str, path: str) -> str:
    """Returns a member's name without a leading ./, with bytes that are not UTF-8 escaped."""
    name = name.encode("utf-8", "backslashreplace").decode()
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{path}: member {name!r} leads out of the archive; it is not read")
    return name.removeprefix("./")


def _check_end(file: _Forward, path: str, progress: str) -> None:
    """Raises InputError unless `tarfile` stopped at zeros, and only zeros follow."""
    if not file.last:
        raise InputError(f"{path} is cut off {progress}")
    while file.last:  # to the end, where gzip has its checksum
        if file.last.strip(b"\0"):
            raise InputError(f"{path} is damaged {progress}: what follows is not tar")
        file.read(1 << 20)
