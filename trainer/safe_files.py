"""Files that are read without trust, and their formats; `data_pipelines.durable` writes them.

Regular files only, never through a link. Sizes, names and types are checked against the header and
the file's length before memory is allocated. No pickle.

Tensors are in the safetensors format: 8 bytes with the length of the header, the header in JSON,
the data.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.durable import Buffer, replacing
from data_pipelines.errors import InputError
from data_pipelines.store.seal import seal_fault, with_seal

# Names in safetensors of the NumPy types that we write.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 1 << 20  # about 10,000 tensors
MAX_JSON_BYTES = 1 << 22
MAX_DIMENSIONS = 32  # of a tensor; NumPy's own limit was 32, and is 64


class DamagedError(Exception):
    """A file is missing, unreadable or has the wrong content; the text says which and why."""


class UnreadableError(DamagedError):
    """Reading failed for a reason outside the file: a flaky disk or network, too many open files.

    It says nothing about the file, which may be intact.
    """


_IO_ERRNOS = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENXIO),
        *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EREMOTEIO, errno.EHOSTDOWN),
    }
)


def refuse_to_replace(folder: Path, flag: str) -> None:
    """Raises InputError if `folder`, named by the user's `flag`, exists.

    `durable.write_folder` replaces a folder without asking, which is right only for folders of a
    run.
    """
    if os.path.lexists(folder):
        raise InputError(f"{flag}={folder} is there already: name a new folder, or remove it")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically and durably, unless it holds the text already."""
    with suppress(DamagedError), opened(path) as file:
        if file.read() == text.encode():
            return
    with replacing(path) as new:
        new.write(text)


def without_links(path: str, flags: int) -> int:
    """Opens a file that is not a link, for the argument `opener` of `open`.

    A pipe is not waited for.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def sealed(values: Mapping[str, Any]) -> bytes:
    """Returns `values` as JSON with a checksum, which `read_sealed` verifies."""
    return (json.dumps(with_seal(values), indent=2) + "\n").encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """Returns the values of a file made by `sealed`.

    Raises:
        DamagedError: The file is missing, a link, larger than 4 MiB, not a JSON object, or its
            checksum is wrong.
    """
    values = read_json(path)
    if fault := seal_fault(values):
        raise DamagedError(f"{path} {fault}")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        DamagedError: The file is missing, a link, larger than 4 MiB, or not a JSON object.
    """
    with opened(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DamagedError(f"{path} has more than {MAX_JSON_BYTES} bytes")
    return _json_object(path, data)


def tensor_parts(tensors: Mapping[str, np.ndarray]) -> list[Buffer]:
    """Returns the parts of a safetensors file, without copying the tensors.

    Tensors with larger types come first, so that all are aligned.
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
    """Returns the bytes of an array in C order, uint8 [bytes], without a copy."""
    return array.reshape(-1).view(np.uint8)


def specs(tensors: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Returns [dtype, shape] by name, for JSON and for `read_tensors`."""
    return {name: [str(array.dtype), list(array.shape)] for name, array in tensors.items()}


def read_tensors(path: Path, expected: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of a file whose header equals `expected`.

    Args:
        expected: From `specs`.

    Raises:
        DamagedError: The file is missing or a link; its header is larger than 1 MiB, damaged, or
            names other tensors than expected; or the file's length does not match the header. All
            is checked before memory is allocated for the tensors.
    """
    with opened(path) as file:
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
    """Returns (dtype, shape, first byte) by name, of tensors that exactly cover `size` bytes."""
    header.pop("__metadata__", None)
    layout, spans = {}, []
    try:
        for name, entry in header.items():
            name.encode()  # JSON allows lone surrogates, UTF-8 does not
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
            start, stop = entry["data_offsets"]
            numbers = [*shape, start, stop]
            if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"shape {shape} or offsets {start}, {stop}")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{stop - start} bytes for a shape of {shape}")
            # An empty tensor too: NumPy computes its strides.
            if len(shape) > MAX_DIMENSIONS or math.prod(n for n in shape if n) >= 1 << 59:
                raise ValueError(f"a shape of {shape!r:.99}")
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
        return "the list of its expected tensors is missing"
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
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise DamagedError(f"{path} has more than {max_bytes} bytes")
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file for reading, not through a link; OSErrors become DamagedError."""
    try:
        # Without blocking: opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedError(f"{path} is not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except OSError as error:
        why = "it is a link" if path.is_symlink() else error.strerror or str(error)
        kind = UnreadableError if error.errno in _IO_ERRNOS else DamagedError
        raise kind(f"{path} cannot be read: {why}") from None


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
