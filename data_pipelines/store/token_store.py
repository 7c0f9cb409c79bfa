"""Tokenized documents on disk: a manifest, a vocabulary and memory-mapped shards.

A store is a folder of
  manifest.json                   what is in it, with sizes and checksums, its own among them
  vocab.txt                       one token a line; line number - 1 is the id
  SPLIT-00000-of-00002.tokens     ids one after the other, little-endian uint16 or uint32; each
                                  document ends with the end token
  SPLIT-00000-of-00002.offsets    int64 [examples + 1]: where each document starts, in tokens
  SPLIT-00000-of-00002.labels     int32 [examples], -1 where there is none
"""

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, RESERVED
from data_pipelines.store.seal import seal_fault
from data_pipelines.store.split_view import (
    LABEL_DTYPE,
    OFFSET_DTYPE,
    Shards,
    SplitView,
    WholeSplit,
)

FORMAT = "warmstate-token-store"
VERSION = 2  # 1 had no checksum of the manifest
NO_LABEL = -1
KINDS = ("tokens", "offsets", "labels")
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
VERIFY_BYTES = 1 << 22
MAX_MANIFEST_BYTES = 1 << 28  # some 400,000 shards


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian type of the ids: uint16, or uint32 for large vocabularies."""
    return np.dtype("<u2" if vocab_size <= 65535 else "<u4")


class TokenStore:
    """A store opened for reading; costs O(shards), whatever its size.

    Its manifest is not trusted: files lie in its folder, are no links, and have the sizes that its
    counts ask for; offsets begin with 0 and end with the number of tokens. `verify` checks the
    rest.

    Args:
        folder: what `prepare` wrote.

    Raises:
        InputError: there is no store, its manifest is damaged, or files are not of the right size;
            one line for each of them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = _read_manifest(self.folder)
        _raise_if([_size_fault(path, entry["bytes"]) for path, entry in self._files()])
        _raise_if(
            [
                _ends_fault(self._path(shard, "offsets"), shard["tokens"])
                for _, shard in self._shards()
            ]
        )

    @property
    def vocab_size(self) -> int:
        """The number of ids, reserved ones included."""
        return self.manifest["vocab_size"]

    @property
    def vocab_sha256(self) -> str:
        """The tokenizer's digest: its config and its vocabulary."""
        return self.manifest["vocab_sha256"]

    @property
    def vocab_path(self) -> Path:
        """The path of `vocab.txt`."""
        return self.folder / "vocab.txt"

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """What `WordTokenizer.load(vocab_path, config)` takes."""
        return self.manifest["tokenizer"]

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1, or -1 for none."""
        return self.manifest["num_classes"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels' names; their numbers in a store that was made without names."""
        return tuple(self.manifest.get("class_names", map(str, range(self.num_classes))))

    @property
    def note(self) -> str:
        """One line about where the splits come from; may be empty."""
        return self.manifest["note"]

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.manifest["splits"])

    def split(self, *names: str) -> "SplitView":
        """Returns a view of one or several splits, one after the other.

        Raises:
            InputError: a split does not exist; the message names those that do.
        """
        for name in names:
            if name not in self.splits:
                raise InputError(
                    f"{self.folder} has no split {name!r}; it has {', '.join(self.splits)}"
                )
        entries = [shard for name in names for shard in self.manifest["splits"][name]["shards"]]
        return WholeSplit(Shards(self.folder, entries, self._token_dtype))

    def verify(self) -> None:
        """Reads every file, in O(1) memory, and checks all that `TokenStore` promises.

        Checksums; that each document has tokens and ends with the end token; that ids are below
        `vocab_size`, and labels below `num_classes`.

        Raises:
            InputError: one line for each fault of each file.
        """
        vocab = self.manifest["vocab_file"]
        faults = [_checksum_fault(self.vocab_path, vocab["sha256"])]
        for _, shard in self._shards():
            paths = {kind: self._path(shard, kind) for kind in KINDS}
            checks: dict[str, _Range | _Rising] = {
                "tokens": _Range(self._token_dtype, 0, self.vocab_size, "ids"),
                "offsets": _Rising(),
                "labels": _Range(LABEL_DTYPE, NO_LABEL, self.num_classes, "labels"),
            }
            for kind in KINDS:
                faults.append(
                    _checksum_fault(paths[kind], shard["files"][kind]["sha256"], checks[kind])
                )
                faults += [f"{paths[kind]} {fault}" for fault in checks[kind].faults]
            if not checks["offsets"].faults:
                faults.append(_end_tokens_fault(paths, self._token_dtype))
        _raise_if(faults)

    @property
    def _token_dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    def _shards(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, split in self.manifest["splits"].items():
            for shard in split["shards"]:
                yield name, shard

    def _path(self, shard: dict[str, Any], kind: str) -> Path:
        return self.folder / f"{shard['name']}.{kind}"

    def _files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        yield self.vocab_path, self.manifest["vocab_file"]
        for _, shard in self._shards():
            for kind in KINDS:
                yield self._path(shard, kind), shard["files"][kind]


def _raise_if(faults: list[str | None]) -> None:
    lines = [fault for fault in faults if fault]
    if lines:
        raise InputError("\n".join(lines))


def _size_fault(path: Path, size: int) -> str | None:
    try:
        found = path.lstat()
    except OSError:
        return f"{path} is missing; the manifest says {size} bytes"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is a link or no file; a store's files lie in its own folder"
    if found.st_size != size:
        return f"{path} has {found.st_size} bytes; the manifest says {size} bytes"
    return None


def _ends_fault(path: Path, num_tokens: int) -> str | None:
    """Returns a fault unless a file of offsets begins with 0 and ends with `num_tokens`."""
    with path.open("rb") as file:
        first = file.read(OFFSET_DTYPE.itemsize)
        file.seek(-OFFSET_DTYPE.itemsize, 2)
        ends = np.frombuffer(first + file.read(), OFFSET_DTYPE).tolist()
    if ends != [0, num_tokens]:
        return (
            f"{path} is damaged: its offsets go from {ends[0]} to {ends[1]}, not 0 to {num_tokens}"
        )
    return None


class _Range:
    """Checks, part by part, that numbers of a file are in [lowest, below)."""

    def __init__(self, dtype: np.dtype, lowest: int, below: int, what: str) -> None:
        self._dtype, self._lowest, self._below, self._what = dtype, lowest, below, what
        self.faults: list[str] = []

    def __call__(self, data: bytes) -> None:
        values = np.frombuffer(data, self._dtype)
        low, high = int(values.min()), int(values.max())
        if not self.faults and (low < self._lowest or high >= self._below):
            self.faults.append(
                f"has {self._what} from {low} to {high}; "
                f"the manifest allows {self._lowest} to {self._below - 1}"
            )


class _Rising:
    """Checks, part by part, that each offset of a file is above the one before."""

    def __init__(self) -> None:
        self._last = -1
        self.faults: list[str] = []

    def __call__(self, data: bytes) -> None:
        offsets = np.frombuffer(data, OFFSET_DTYPE)
        # Compared, not subtracted: a difference of damaged numbers may overflow.
        rising = offsets[0] > self._last and bool((offsets[1:] > offsets[:-1]).all())
        if not self.faults and not rising:
            self.faults.append("has offsets that do not rise: a document has no tokens")
        self._last = int(offsets[-1])


def _checksum_fault(
    path: Path, sha256: str, check: Callable[[bytes], None] = lambda data: None
) -> str | None:
    """Reads a file once: its checksum, and `check` of each part of it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(VERIFY_BYTES):
            digest.update(data)
            check(data)
    if digest.hexdigest() != sha256:
        return f"{path} is damaged: its sha256 is not the manifest's"
    return None


def _end_tokens_fault(paths: dict[str, Path], dtype: np.dtype) -> str | None:
    """Returns a fault unless the token before each offset but the first is the end token."""
    with paths["tokens"].open("rb") as tokens, paths["offsets"].open("rb") as offsets:
        first = 0
        while data := offsets.read(VERIFY_BYTES):
            stops = np.frombuffer(data, OFFSET_DTYPE)
            # Parts of the tokens that these offsets point into.
            for start in range(first, int(stops[-1]), VERIFY_BYTES):
                stop = min(start + VERIFY_BYTES, int(stops[-1]))
                tokens.seek(start * dtype.itemsize)
                part = np.frombuffer(tokens.read((stop - start) * dtype.itemsize), dtype)
                inside = stops[(stops > start) & (stops <= stop)]
                if not (part[inside - 1 - start] == END_ID).all():
                    return f"{paths['tokens']} has a document without an end token"
            first = int(stops[-1])
    return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is a link or no file; a store's files lie in its own folder")
        if status.st_size > MAX_MANIFEST_BYTES:
            raise InputError(f"{path} has {status.st_size} bytes, more than {MAX_MANIFEST_BYTES}")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} is not a token store: it has no manifest.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a token store")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} has version {manifest.get('version')}; this program reads version {VERSION}: "
            "prepare the store again"
        )
    if fault := seal_fault(manifest):
        raise InputError(f"{path} {fault}: prepare the store again")
    try:
        _check_manifest(manifest)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises KeyError or ValueError unless the manifest is one that we write."""
    for key in ("source", "note", "vocab_sha256"):
        _typed(manifest, key, str)
    for key in ("tokenizer", "prepare_config"):
        _typed(manifest, key, dict)
    _check_class_names(manifest.get("class_names"), _count(manifest, "num_classes"))
    if not len(RESERVED) <= _count(manifest, "vocab_size") < 2**31:
        raise ValueError(f"vocab_size {manifest['vocab_size']}")
    dtype = token_dtype(manifest["vocab_size"])
    if _typed(manifest, "token_dtype", str) != dtype.name:
        raise ValueError(f"token_dtype {manifest['token_dtype']!r} should be {dtype.name!r}")
    _check_file(_typed(manifest, "vocab_file", dict))
    for split, entry in _typed(manifest, "splits", dict).items():
        if not SPLIT_NAME.fullmatch(split):
            raise ValueError(f"split name {split!r}")
        if not isinstance(entry, dict):
            raise ValueError(f"split {split} is not an object")
        shards = _typed(entry, "shards", list)
        for number, shard in enumerate(shards):
            _check_shard(shard, f"{split}-{number:05d}-of-{len(shards):05d}", dtype)
        for count in ("examples", "tokens"):
            if _count(entry, count) != sum(shard[count] for shard in shards):
                raise ValueError(f"split {split}: its shards do not add up to its {count}")


def _check_class_names(names: Any, count: int) -> None:
    if names is None:  # a store made before there were names
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is no list of names")
    if len(names) != count:
        raise ValueError(f"{len(names)} class_names for {count} classes")


def _check_shard(shard: Any, name: str, dtype: np.dtype) -> None:
    # Also keeps a manifest from naming files outside its folder.
    if not isinstance(shard, dict) or shard["name"] != name:
        raise ValueError(f"{name} is missing, or has another name")
    examples, tokens = _count(shard, "examples"), _count(shard, "tokens")
    expected = {
        "tokens": tokens * dtype.itemsize,
        "offsets": (examples + 1) * OFFSET_DTYPE.itemsize,
        "labels": examples * LABEL_DTYPE.itemsize,
    }
    for kind in KINDS:
        if _check_file(_typed(_typed(shard, "files", dict), kind, dict)) != expected[kind]:
            raise ValueError(f"{name}.{kind} should have {expected[kind]} bytes")


def _check_file(entry: dict[str, Any]) -> int:
    """Returns the bytes of a manifest's entry for a file."""
    _typed(entry, "sha256", str)
    return _count(entry, "bytes")


def _count(mapping: dict[str, Any], key: str) -> int:
    value = _typed(mapping, key, int)
    if value < 0:
        raise ValueError(f"{key} is {value}")
    return value


def _typed(mapping: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(mapping[key], kind):
        raise ValueError(f"{key} is not of type {kind.__name__}")
    return mapping[key]
