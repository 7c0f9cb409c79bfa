"""Tokenized documents on disk: a manifest, a vocabulary and memory-mapped shards.

A store is a folder of
  manifest.json                   what is in it, with sizes and checksums
  vocab.txt                       one token a line; line number - 1 is the id
  SPLIT-00000-of-00002.tokens     ids one after the other, little-endian uint16 or uint32; each
                                  document ends with the end token
  SPLIT-00000-of-00002.offsets    int64 [examples + 1]: where each document starts, in tokens
  SPLIT-00000-of-00002.labels     int32 [examples], -1 where there is none
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID

FORMAT = "warmstate-token-store"
VERSION = 1
NO_LABEL = -1
KINDS = ("tokens", "offsets", "labels")
OFFSET_DTYPE = np.dtype("<i8")
LABEL_DTYPE = np.dtype("<i4")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian type of the ids: uint16, or uint32 for large vocabularies."""
    return np.dtype("<u2" if vocab_size <= 65535 else "<u4")


class TokenStore:
    """A store opened for reading; costs O(shards), whatever its size.

    Args:
        folder: what `prepare` wrote.

    Raises:
        InputError: there is no store, its manifest is damaged, or a file's size is wrong.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = _read_manifest(self.folder)
        for path, entry in self._files():
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise InputError(f"{path} {found}; the manifest says {entry['bytes']} bytes")

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
        dtype = np.dtype(self.manifest["token_dtype"]).newbyteorder("<")
        shards = [
            _Shard(self.folder, shard, dtype)
            for name in names
            for shard in self.manifest["splits"][name]["shards"]
        ]
        return SplitView(shards)

    def verify(self) -> None:
        """Reads every file and checks it against the manifest's checksum.

        Raises:
            InputError: one line for each damaged file.
        """
        faults = []
        for path, entry in self._files():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    faults.append(f"{path} is damaged: its sha256 is not the manifest's")
        if faults:
            raise InputError("\n".join(faults))

    def _files(self) -> Iterable[tuple[Path, dict[str, Any]]]:
        yield self.vocab_path, self.manifest["vocab_file"]
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                for kind in KINDS:
                    yield self.folder / f"{shard['name']}.{kind}", shard["files"][kind]


class _Shard:
    """One shard's three arrays, mapped, not read."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype) -> None:
        def mapped(kind: str, kind_dtype: np.dtype) -> np.ndarray:
            path = folder / f"{entry['name']}.{kind}"
            # A plain array on the map: np.memmap's own slices cost several times more.
            return np.asarray(np.memmap(path, kind_dtype, mode="r"))

        self.tokens = mapped("tokens", dtype)  # [tokens]
        self.offsets = mapped("offsets", OFFSET_DTYPE)  # [examples + 1]
        self.labels = mapped("labels", LABEL_DTYPE)  # [examples]


class SplitView:
    """Documents of one or several splits, numbered from 0; made by `TokenStore.split`."""

    def __init__(self, shards: list[_Shard]) -> None:
        self._shards = shards
        # Where each document's words are, its end token left out: all [documents].
        self._shard = np.repeat(np.arange(len(shards)), [len(s.labels) for s in shards])
        self._start = np.concatenate([s.offsets[:-1] for s in shards])
        self._stop = np.concatenate([s.offsets[1:] for s in shards]) - 1
        self._labels = np.concatenate([s.labels for s in shards]).astype(np.int32)

    def _chosen(self, chosen: np.ndarray) -> "SplitView":
        view = SplitView.__new__(SplitView)
        view._shards = self._shards
        for name in ("_shard", "_start", "_stop", "_labels"):
            setattr(view, name, getattr(self, name)[chosen])
        return view

    def sample(self, documents: int, seed: int) -> "SplitView":
        """Returns a view of `documents` of these, chosen by `seed`, in this view's order.

        Raises:
            ValueError: there are not that many.
        """
        if not 1 <= documents <= len(self):
            raise ValueError(f"{documents} documents were asked for; there are {len(self)}")
        # The raw bits of Philox: NumPy keeps them for ever, and not how it shuffles.
        bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(self))
        return self._chosen(np.sort(np.argsort(bits, kind="stable")[:documents]))

    def pieces(self, max_tokens: int) -> "SplitView":
        """Returns a view in which every longer document is cut into pieces of `max_tokens`.

        The pieces of a document are in order and of equal length, give or take a word; each ends
        with an end token, which counts among its tokens, and has the document's label.

        Args:
            max_tokens: the most tokens of a piece; at least 2.
        """
        words = self._stop - self._start
        counts = np.maximum(1, -(-words // (max_tokens - 1)))
        view = self._chosen(np.repeat(np.arange(len(self)), counts))
        first = np.repeat(np.cumsum(counts) - counts, counts)
        number = np.arange(len(view)) - first  # of a piece in its document
        words, counts = np.repeat(words, counts), np.repeat(counts, counts)
        start = view._start
        view._start = start + number * words // counts
        view._stop = start + (number + 1) * words // counts
        return view

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._labels)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end token included: int32 [documents], read-only."""
        return _frozen(self._stop - self._start + 1)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Label of each document, -1 for none: int32 [documents], read-only."""
        return _frozen(self._labels)

    def gather(
        self, indices: np.ndarray, max_tokens: int, pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the LAST `max_tokens` tokens of some documents.

        Args:
            indices: integers [n] in 0 .. len - 1, in any order.
            max_tokens: the most tokens of a document; at least 1.
            pad_to: the width of the result; None means the longest, after cutting.

        Returns:
            tokens int32 [n, pad_to], right-padded with 0, and lengths int32 [n].

        Raises:
            IndexError: an index is out of range.
            ValueError: a (cut) document is longer than `pad_to`, or max_tokens < 1.
        """
        indices = np.asarray(indices, np.int64)
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"a document outside 0 .. {len(self) - 1}")
        lengths = np.minimum(self.lengths[indices], max_tokens)
        longest = int(lengths.max(initial=0))
        width = longest if pad_to is None else pad_to
        if longest > width:
            raise ValueError(f"pad_to={pad_to}, but a document has {longest} tokens")
        tokens = np.full((len(indices), width), PADDING_ID, np.int32)
        rows = zip(
            self._shard[indices].tolist(),
            self._stop[indices].tolist(),
            (lengths - 1).tolist(),
            strict=True,
        )
        for row, (shard, stop, words) in enumerate(rows):
            tokens[row, :words] = self._shards[shard].tokens[stop - words : stop]
            tokens[row, words] = END_ID
        return tokens, lengths


class StoreWriter:
    """Writes a store beside `folder` and moves it there when it is complete.

    A context manager: leaving it by an exception, or without `finish`, removes what was written.
    One writer a folder at a time; `prepare.ensure_store` holds the lock that sees to it.

    Args:
        folder: where the store is to be; it must not exist, or be empty.

    Attributes:
        temporary: the folder written to; whatever lies there at `finish` becomes the store.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.temporary = self._folder.with_name(self._folder.name + ".building")
        self._splits: dict[str, Any] = {}

    def __enter__(self) -> "StoreWriter":
        # What a killed writer left behind.
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    def write_split(
        self,
        split: str,
        num_shards: int,
        shards: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
        dtype: np.dtype,
    ) -> None:
        """Writes one split.

        Args:
            split: its name.
            num_shards: how many `shards` there are; part of the files' names.
            shards: for each shard tokens [tokens], lengths [examples] and labels [examples].
            dtype: of the tokens on disk, from `token_dtype`; the same for all splits.
        """
        entries = []
        for number, (tokens, lengths, labels) in enumerate(shards):
            name = f"{split}-{number:05d}-of-{num_shards:05d}"
            arrays = {
                "tokens": tokens.astype(dtype),
                "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(OFFSET_DTYPE),
                "labels": labels.astype(LABEL_DTYPE),
            }
            files = {
                kind: _write_file(self.temporary / f"{name}.{kind}", array.tobytes())
                for kind, array in arrays.items()
            }
            entries.append(
                {"name": name, "examples": len(labels), "tokens": len(tokens), "files": files}
            )
        if len(entries) != num_shards:
            raise ValueError(f"split {split}: {len(entries)} shards instead of {num_shards}")
        self._splits[split] = {
            "examples": sum(e["examples"] for e in entries),
            "tokens": sum(e["tokens"] for e in entries),
            "shards": entries,
        }

    def finish(self, vocab: bytes, facts: dict[str, Any]) -> None:
        """Writes the vocabulary and the manifest, and puts the store in its place.

        Args:
            vocab: the contents of vocab.txt.
            facts: the manifest's `source`, `note`, `num_classes`, `tokenizer`, `vocab_size`,
                `vocab_sha256` and `prepare_config`.
        """
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **facts,
            "vocab_file": _write_file(self.temporary / "vocab.txt", vocab),
            "token_dtype": token_dtype(facts["vocab_size"]).name,
            "splits": self._splits,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        _write_file(self.temporary / "manifest.json", text.encode())
        _fsync_folder(self.temporary)
        os.rename(self.temporary, self._folder)
        _fsync_folder(self._folder.parent)


def _frozen(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int32)
    values.flags.writeable = False
    return values


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Writes a file through to the disk and returns the manifest's entry for it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} is not a token store: it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a token store")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} has version {manifest.get('version')}; this program reads version {VERSION}: "
            "prepare the store again"
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless the manifest is one that we write."""
    types = {
        "source": str,
        "note": str,
        "num_classes": int,
        "tokenizer": dict,
        "vocab_size": int,
        "vocab_sha256": str,
        "prepare_config": dict,
    }
    for key, kind in types.items():
        if not isinstance(manifest[key], kind):
            raise TypeError(f"{key} is not of type {kind.__name__}")
    dtype = token_dtype(manifest["vocab_size"])
    if manifest["token_dtype"] != dtype.name:
        raise ValueError(f"token_dtype {manifest['token_dtype']!r} should be {dtype.name!r}")
    _check_file_entry(manifest["vocab_file"])
    for split, entry in manifest["splits"].items():
        shards = entry["shards"]
        for number, shard in enumerate(shards):
            # Also keeps a manifest from naming files outside its folder.
            if "/" in split or shard["name"] != f"{split}-{number:05d}-of-{len(shards):05d}":
                raise ValueError(f"shard name {shard['name']!r}")
            expected = {
                "tokens": shard["tokens"] * dtype.itemsize,
                "offsets": (shard["examples"] + 1) * OFFSET_DTYPE.itemsize,
                "labels": shard["examples"] * LABEL_DTYPE.itemsize,
            }
            for kind in KINDS:
                _check_file_entry(shard["files"][kind])
                if shard["files"][kind]["bytes"] != expected[kind]:
                    raise ValueError(f"{shard['name']}.{kind} should have {expected[kind]} bytes")
        for count in ("examples", "tokens"):
            if entry[count] != sum(shard[count] for shard in shards):
                raise ValueError(f"split {split}: its shards do not add up to its {count}")


def _check_file_entry(entry: dict[str, Any]) -> None:
    if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
        raise TypeError("a file's bytes or sha256 is of the wrong type")
