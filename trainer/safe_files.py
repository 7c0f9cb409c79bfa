"""Files that are written so that they survive a crash, and read as if a stranger had written them.

Written: beside their place, flushed to the disk, renamed, and the folder flushed as well; so that
after a power loss there is either the old or the new.

Read: regular files only, never through a link; sizes, names and types are checked against the
header and the file's length before memory is taken for them. No pickle.

The format of tensors is safetensors: 8 bytes, the header's length; the header, JSON; the bytes.
"""

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.store.seal import seal_fault, with_seal
from data_pipelines.store.store_writer import flush_folder

# The names that safetensors gives to the types of NumPy's that we write.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
Buffer = bytes | np.ndarray
MAX_HEADER_BYTES = 1 << 20  # some 10,000 tensors
MAX_JSON_BYTES = 1 << 22


class DamagedError(Exception):
    """A file is not there, cannot be read, or does not hold what it must; says which and why."""


def write_durably(path: Path, parts: Sequence[Buffer]) -> None:
    """Writes a new file, of parts one after the other, and flushes it to the disk."""
    with path.open("xb") as file:
        for part in parts:
            file.write(part if isinstance(part, bytes) else part.data)
        file.flush()
        os.fsync(file.fileno())


def write_folder(new: Path, folder: Path, files: Mapping[str, bytes | Sequence[Buffer]]) -> None:
    """Writes files, name -> bytes or parts, to `new`, and renames it to `folder`, which may exist.

    If the power fails between the two renames of a folder that existed, its new and its old form
    are still there, as NAME.new and NAME.old, and a resumed run writes it again.
    """
    remove(new)  # what a killed writer left
    new.mkdir(parents=True)
    for name, data in files.items():
        write_durably(new / name, [data] if isinstance(data, bytes) else data)
    flush_folder(new)
    old = folder.with_name(folder.name + ".old")
    remove(old)
    if os.path.lexists(folder):
        folder.rename(old)
    new.rename(folder)
    flush_folder(folder.parent)
    remove(old)


def refuse_to_replace(folder: Path, flag: str) -> None:
    """Raises InputError if there is anything at `folder`, which the user's `flag` names.

    `write_folder` puts its own in the place of whatever is there: right for a run's own folders.
    """
    if os.path.lexists(folder):
        raise InputError(f"{flag}={folder} is there already: name a new folder, or remove it")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file beside `path` and renames it: whoever is killed leaves the old or the new.

    It is not flushed: for what a run can do without.
    """
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sealed(values: Mapping[str, Any]) -> bytes:
    """Returns `values` as JSON, with a checksum of its own, which `read_sealed` verifies."""
    return (json.dumps(with_seal(values), indent=2) + "\n").encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """Returns what `sealed` was given.

    Raises:
        DamagedError: The file is missing, a link, larger than 4 MiB, no JSON object, or its
            checksum is wrong.
    """
    with _opened(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DamagedError(f"{path} has more than {MAX_JSON_BYTES} bytes")
    values = _json_object(path, data)
    if fault := seal_fault(values):
        raise DamagedError(f"{path} {fault}")
    return values


def tensor_parts(tensors: Mapping[str, np.ndarray]) -> list[Buffer]:
    """Returns the parts of a file of tensors in the format of safetensors; no bytes are copied.

    They are sorted by the size of their type, so that each is aligned to it.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(flat_bytes(arrays[name]) for name in names)]


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array in C order, uint8 [bytes], without a copy of them."""
    return array.reshape(-1).view(np.uint8)


def specs(tensors: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Returns name -> [dtype, shape], as JSON can hold it and `read_tensors` wants it."""
    return {name: [str(array.dtype), list(array.shape)] for name, array in tensors.items()}


def read_tensors(path: Path, expected: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, once its header is what was `expected`.

    Args:
        expected: As `specs` returns it.

    Raises:
        DamagedError: The file is missing or a link; its header is larger than 1 MiB, damaged, or
            names other tensors than expected; or the file's length is not what the header asks for.
            All before memory is taken for the tensors.
    """
    with _opened(path) as file:
        total = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if total < 8 or size > min(total - 8, MAX_HEADER_BYTES):
            raise DamagedError(
                f"{path} is damaged: its header would have {size} of its {total} bytes; "
                f"{MAX_HEADER_BYTES} are allowed"
            )
        layout = _layout(path, _json_object(path, file.read(size)), total - 8 - size)
        found = {name: [str(dtype), shape] for name, (dtype, shape, _) in layout.items()}
        if found != expected:
            raise DamagedError(f"{path} is damaged: {_difference(found, expected)}")
        data = bytearray(total - 8 - size)
        if file.readinto(data) != len(data):
            raise DamagedError(f"{path} ends before its {total} bytes")
    return {
        name: np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        for name, (dtype, shape, start) in layout.items()
    }


def _layout(
    path: Path, header: dict[str, Any], size: int
) -> dict[str, tuple[np.dtype, list[int], int]]:
    """Returns name -> (dtype, shape, first byte) of tensors that fill `size` bytes, none twice."""
    header.pop("__metadata__", None)
    layout, spans = {}, []
    try:
        for name, entry in header.items():
            name.encode()  # JSON can hold what UTF-8 cannot
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
            start, stop = entry["data_offsets"]
            numbers = [*shape, start, stop]
            if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"shape {shape} or offsets {start}, {stop}")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{stop - start} bytes for a shape of {shape}")
            layout[name] = (dtype, shape, start)
            spans.append((start, stop))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(
            f"{path} is damaged: its header's entry {name!r}: {type(error).__name__}: {error}"
        ) from None
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise DamagedError(f"{path} is damaged: its tensors overlap, or leave a gap")
        end = stop
    if end != size:
        raise DamagedError(f"{path} is damaged: its header asks for {end} bytes; it has {size}")
    return layout


def _difference(found: dict[str, Any], expected: Any) -> str:
    if not isinstance(expected, dict):
        return "there is no list of the tensors that it should have"
    names = sorted(found.keys() ^ expected.keys())
    names = names or sorted(name for name in found if found[name] != expected[name])
    return (
        f"tensor {names[0]!r} is {found.get(names[0], 'not there')} and should be "
        f"{expected.get(names[0], 'not there')}; {len(names)} differ"
    )


def file_sha256(path: Path, max_bytes: int) -> str:
    """Returns the SHA-256 (hex) of a file of at most `max_bytes`.

    Raises:
        DamagedError: It is missing, a link, or larger.
    """
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise DamagedError(f"{path} has more than {max_bytes} bytes")
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file; errors of reading become DamagedError."""
    try:
        # Not waiting: to open a pipe for reading waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedError(f"{path} is no regular file")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except OSError as error:
        why = "it is a link" if path.is_symlink() else error.strerror or str(error)
        raise DamagedError(f"{path} cannot be read: {why}") from None


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: no JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise DamagedError(f"{path} is damaged: no JSON object")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
