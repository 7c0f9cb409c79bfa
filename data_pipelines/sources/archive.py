"""A data set's files in a folder, or in a tar archive that is read without unpacking it."""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar, cast

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample

T = TypeVar("T")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
# Given a member's name, where it is (for messages) and its open bytes.
Reader = Callable[[str, str, BinaryIO], Iterator[T]]


class Archive:
    """A folder or a tar archive (.tar, .tar.gz, .tgz, .tar.zst).

    Attributes:
        path: of the folder or the archive.
        names: of the files: a folder's sorted, an archive's in its order.

    Raises:
        InputError: there is no such folder or archive, or the archive is damaged: it is read to
            its end once.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        self.names: list[str] = []
        self.is_tar = path.endswith(TAR_ENDINGS)
        if not path:
            raise InputError("names no folder and no tar archive")
        if self.is_tar:
            self._list_tar()
        elif files.is_dir(self.path):
            self.names = [name[len(self.path) + 1 :] for name in files.walk(self.path)]
        else:
            raise InputError(f"{path} is neither a folder nor one of *{', *'.join(TAR_ENDINGS)}")

    def _list_tar(self) -> None:
        if not files.is_file(self.path):
            raise InputError(f"{self.path} is missing")

        def note(name: str) -> bool:
            self.names.append(name)
            return False

        for _ in self._read_tar(note, lambda *_: iter(())):
            raise AssertionError("unreachable: no member is wanted")

    def require(self, wanted: dict[str, str]) -> None:
        """Checks that there is a file for each pattern.

        Args:
            wanted: regular expressions, by what to call their files.

        Raises:
            InputError: files are missing, one line each.
        """
        missing = [
            f"{self.path} has no {what}"
            for what, pattern in wanted.items()
            if not any(re.search(pattern, name) for name in self.names)
        ]
        if missing:
            raise InputError("\n".join(missing))

    def read(self, pattern: str, read: Reader[T]) -> Iterator[T | BadExample]:
        """Yields what `read` yields for each file whose name matches, in the order of `names`.

        Raises:
            InputError: the archive is damaged, cut off, or has a member whose name leads out of it.
        """
        matches = re.compile(pattern).search
        if self.is_tar:
            yield from self._read_tar(lambda name: matches(name) is not None, read)
        else:
            yield from self.read_names([name for name in self.names if matches(name)], read)

    def read_names(self, names: list[str], read: Reader[T]) -> Iterator[T]:
        """Yields what `read` yields for each of these files of a folder."""
        for name in names:
            path = f"{self.path}/{name}"
            try:
                with files.open_decompressed(path) as file:
                    yield from read(name, path, file)
            except files.READ_ERRORS as error:
                raise files.read_error(path, error, "before its end") from error

    def _read_tar(self, wanted: Callable[[str], bool], read: Reader[T]) -> Iterator[T | BadExample]:
        progress = "at its first member"
        try:
            with (
                files.open_decompressed(self.path) as file,
                tarfile.open(fileobj=file, mode="r:") as tar,
            ):
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    name = _member_name(info.name, self.path)
                    progress = f"after member {name}"
                    if info.isdir() or not wanted(name):
                        continue
                    where = f"{self.path}, member {name}"
                    if info.isreg():
                        yield from read(name, where, cast(BinaryIO, tar.extractfile(info)))
                    else:
                        yield BadExample(where, "a link or a device, not a file")
                _check_end(file, tar.offset, self.path, progress)
        except tarfile.TarError as error:
            raise InputError(f"{self.path} is damaged or cut off {progress} ({error})") from error
        except files.READ_ERRORS as error:
            raise files.read_error(self.path, error, progress) from error


def _member_name(name: str, path: str) -> str:
    """Returns a member's name without a leading ./, bytes that are no text written out."""
    name = name.encode("utf-8", "backslashreplace").decode()
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{path}: member {name!r} leads out of the archive; it is not read")
    return name.removeprefix("./")


def _check_end(file: BinaryIO, offset: int, path: str, progress: str) -> None:
    """Raises unless nothing but zeros follows, and some of them: tarfile ends silently."""
    file.seek(offset)
    ended = False
    while data := file.read(1 << 20):  # to the end, where gzip has its checksum
        ended = True
        if data.strip(b"\0"):
            raise InputError(f"{path} is damaged {progress}: what follows is not tar")
    if not ended:
        raise InputError(f"{path} is cut off {progress}")
