"""What a disk may hold after a power failure, from the log of injector.c.

A file's bytes are safe once the file is flushed, names once their folder is. Of names that are not
flushed any may be there: each alone, all but each, none, all. Bytes that are not flushed are lost,
or half of a file's are there. File systems promise no more; most keep more.
"""

import dataclasses
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

KINDS = ("create", "open", "write", "fsync", "rename", "exchange", "mkdir", "unlink", "rmdir",
         "truncate", "close", "link")  # fmt: skip
_RANDOM = re.compile(r"\.[0-9a-f]{32}\.partial")  # names of durable.write_file
_HEAD = struct.Struct("<IIiIIQQ")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One entry of the log; paths are absolute, `other` is "" or says more about the kind."""

    number: int
    kind: str
    result: int
    path: str
    other: str
    offset: int
    data: bytes


def read_log(path: Path) -> list[Operation]:
    """Returns the operations in the order in which they ended."""
    log, at, found = path.read_bytes(), 0, []
    while at < len(log):
        number, kind, result, *sizes, offset, data_bytes = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        parts = []
        for size in (*sizes, data_bytes):
            parts.append(log[at : at + size])
            at += size
        name, other = (part.decode() for part in parts[:2])
        found.append(Operation(number, KINDS[kind - 1], result, name, other, offset, parts[2]))
    return found


class _File:
    def __init__(self, data: bytes = b""):
        self.data, self.safe = bytearray(data), bytes(data)

    def with_share(self, share: float) -> bytes:
        """Returns what is safe and a share of what was appended, or of what was rewritten."""
        safe = self.safe if self.data.startswith(self.safe) else b""
        new = self.data[len(safe) :]
        return safe + bytes(new[: int(share * len(new))])


class _Folder:
    def __init__(self):
        self.names: dict[str, _File | _Folder] = {}
        self.safe: dict[str, _File | _Folder] = {}


Change = list[tuple[_Folder, str, "_File | _Folder | None"]]  # names that one operation sets
Tree = dict[str, "Tree | bytes"]


class Disk:
    """The files below a folder: as programs see them, and what of them is safe."""

    def __init__(self, root: Path):
        self._root = str(root)
        self._top = self._read(root)
        self._pending: list[Change] = []

    def rebase(self, root: Path) -> None:
        """Takes the paths of operations to be below another folder of the same content."""
        self._root = str(root)

    def _read(self, path: Path) -> _Folder | _File:
        if not path.is_dir():
            return _File(path.read_bytes())
        folder = _Folder()
        folder.names = {each.name: self._read(each) for each in path.iterdir()}
        folder.safe = dict(folder.names)
        return folder

    def _place(self, path: str) -> tuple[_Folder, str]:
        *above, name = path.removeprefix(self._root).strip("/").split("/")
        folder = self._top
        for each in above:
            folder = folder.names[each]
        return folder, name

    def _node(self, path: str) -> "_File | _Folder":
        folder, name = self._place(path)
        return folder.names[name] if name else self._top

    def do(self, operation: Operation) -> None:
        """Repeats an operation that succeeded."""
        if operation.result < 0 or operation.path.endswith(" (deleted)"):
            return
        kind, path = operation.kind, operation.path
        if kind in ("create", "mkdir"):
            self._change((path, _Folder() if kind == "mkdir" else _File()))
        elif kind in ("unlink", "rmdir"):
            self._change((path, None))
        elif kind == "rename":
            self._change((path, None), (operation.other, self._node(path)))
        elif kind == "link":
            self._change((operation.other, self._node(path)))
        elif kind == "exchange":
            here, there = self._node(path), self._node(operation.other)
            self._change((path, there), (operation.other, here))
        elif kind == "write":
            file, end = self._node(path), operation.offset + len(operation.data)
            file.data.extend(bytes(max(0, end - len(file.data))))
            file.data[operation.offset : end] = operation.data
        elif kind == "truncate" or (kind, operation.other) == ("open", "truncate"):
            size = int(operation.other) if kind == "truncate" else 0
            file = self._node(path)
            del file.data[size:]
            file.data.extend(bytes(size - len(file.data)))
        elif kind == "fsync":
            self._flush(self._node(path))

    def _change(self, *names: "tuple[str, _File | _Folder | None]") -> None:
        change = [(*self._place(path), node) for path, node in names]
        for folder, name, node in change:
            _set(folder.names, name, node)
        self._pending.append(change)

    def _flush(self, node: "_File | _Folder") -> None:
        if isinstance(node, _File):
            node.safe = bytes(node.data)
            return
        node.safe = dict(node.names)
        # Of a rename between two folders each is flushed by itself.
        left = [[each for each in change if each[0] is not node] for change in self._pending]
        self._pending = [change for change in left if change]

    def seen(self) -> Tree:
        """Returns what programs see."""
        return _tree(self._top, lambda folder: folder.names, lambda file: bytes(file.data))

    def after_power_loss(self) -> Iterator[tuple[str, Tree]]:
        """Yields what the disk may hold if the power fails now, each with a name."""
        number = range(len(self._pending))
        yield "nothing that was not flushed", self._with([], lambda file: file.safe)
        yield "all names, no bytes", self._with(number, lambda file: file.with_share(0))
        yield "all names, half of the bytes", self._with(number, lambda file: file.with_share(0.5))
        for i in number:
            yield f"only name {i}", self._with([i], lambda file: file.safe)
            others = [j for j in number if j != i]
            yield f"all names but {i}", self._with(others, lambda file: file.safe)

    def _with(self, chosen: Iterable[int], content: Callable[[_File], bytes]) -> Tree:
        """Returns the safe files with the chosen changes of names."""
        names: dict[_Folder, dict] = {}
        for i in chosen:
            for folder, name, node in self._pending[i]:
                _set(names.setdefault(folder, dict(folder.safe)), name, node)
        return _tree(self._top, lambda folder: names.get(folder, folder.safe), content)


def _set(names: dict, name: str, node: "_File | _Folder | None") -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _tree(node: "_File | _Folder", names: Callable, content: Callable) -> "Tree | bytes":
    if isinstance(node, _File):
        return content(node)
    return {name: _tree(each, names, content) for name, each in sorted(names(node).items())}


def digest(tree: Tree) -> str:
    """Returns what is equal for equal trees alone, up to random names."""
    return hashlib.sha256(_RANDOM.sub("random", repr(tree)).encode()).hexdigest()


def write(tree: Tree, folder: Path) -> None:
    """Makes the folder with this content."""
    os.mkdir(folder)
    for name, held in tree.items():
        if isinstance(held, dict):
            write(held, folder / name)
        else:
            (folder / name).write_bytes(held)


def read(folder: Path) -> Tree:
    """Returns the content of a folder."""
    return Disk(folder).seen()
