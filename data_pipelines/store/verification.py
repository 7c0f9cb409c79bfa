"""Reads all of a token store and finds what is wrong with it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, RESERVED, UNKNOWN_ID
from data_pipelines.store.manifest import (
    LABEL_DTYPE,
    NO_CONTEXT,
    NO_LABEL,
    OFFSET_DTYPE,
    kinds_of,
    shards_of,
    token_dtype,
)
from data_pipelines.tokenizers.vocabulary import check_lines, digest, read_pieces

READ_BYTES = 1 << 22


def store_faults(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yields the faults of a store's files, in O(1) memory; see `TokenStore.verify`."""
    yield from _vocabulary_faults(folder / "vocab.txt", manifest)
    for name, split in manifest["splits"].items():
        if not split["examples"]:
            yield f"{folder} has no documents in its split {name}"
    for shard in shards_of(manifest):
        paths = {kind: folder / f"{shard['name']}.{kind}" for kind in kinds_of(manifest)}
        yield from _shard_faults(paths, shard, manifest)


def _shard_faults(
    paths: dict[str, Path], shard: dict[str, Any], manifest: dict[str, Any]
) -> Iterator[str]:
    ids = manifest["vocab_size"]
    labels = len(manifest["label_sets"]) if "label_sets" in manifest else manifest["num_classes"]
    dtype = token_dtype(ids)
    checks: dict[str, tuple[np.dtype, _Range | _Rising]] = {
        "tokens": (dtype, _Range("ids", UNKNOWN_ID, ids - 1)),
        "offsets": (OFFSET_DTYPE, _Rising()),
        "labels": (LABEL_DTYPE, _Range("labels", NO_LABEL, labels - 1)),
    }
    if "context_names" in manifest:
        check_contexts = _Range("contexts", NO_CONTEXT, len(manifest["context_names"]) - 1)
        checks["contexts"] = (LABEL_DTYPE, check_contexts)
    for kind, (kind_dtype, check) in checks.items():
        sha256 = hashlib.sha256()
        for block in _blocks(paths[kind], kind_dtype):
            sha256.update(block.data)
            check(block)
        if sha256.hexdigest() != shard["files"][kind]["sha256"]:
            yield _damaged(paths[kind])
        if check.fault:
            yield f"{paths[kind]} {check.fault}"
    if not checks["offsets"][1].fault and not _all_end(paths, dtype):
        yield f"{paths['tokens']} has a document without an end token"


class _Range:
    """Checks, block by block, that numbers are between `low` and `high`."""

    def __init__(self, what: str, low: int, high: int) -> None:
        self._what, self._low, self._high = what, low, high
        self.fault = ""

    def __call__(self, block: np.ndarray) -> None:
        low, high = int(block.min()), int(block.max())
        if not self.fault and (low < self._low or high > self._high):
            self.fault = (
                f"has {self._what} from {low} to {high}; "
                f"the manifest allows {self._low} to {self._high}"
            )


class _Rising:
    """Checks, block by block, that each offset is above the one before."""

    def __init__(self) -> None:
        self._last = -1
        self.fault = ""

    def __call__(self, block: np.ndarray) -> None:
        # Compared, not subtracted: a difference of damaged numbers may overflow.
        if not (block[0] > self._last and (block[1:] > block[:-1]).all()):
            self.fault = "has offsets that do not rise: a document has no tokens"
        self._last = int(block[-1])


def _vocabulary_faults(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["vocab_file"]["sha256"]:
        yield _damaged(path)
        return
    config, size = manifest["tokenizer"], manifest["vocab_size"]
    try:
        pieces = read_pieces(path, config["type"])
        if config["type"] != "character":  # whose lines `read_pieces` checks
            check_lines(pieces)
    except InputError as error:
        yield f"{path}: {error}"
        return
    if len(RESERVED) + len(pieces) != size:
        yield f"{path} has {len(RESERVED) + len(pieces)} lines; the manifest says {size}"
    elif digest(config, data) != manifest["vocab_sha256"]:
        yield f"{path} is not the vocabulary of the manifest's vocab_sha256"


def _damaged(path: Path) -> str:
    return f"{path} is damaged: its sha256 is not the manifest's"


def _blocks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            yield np.frombuffer(data, dtype)


def _all_end(paths: dict[str, Path], dtype: np.dtype) -> bool:
    """Returns whether the token before each offset but the first is the end token."""
    with paths["tokens"].open("rb") as tokens:
        first = 0
        for stops in _blocks(paths["offsets"], OFFSET_DTYPE):
            # The tokens that these offsets point into, block by block.
            for start in range(first, int(stops[-1]), READ_BYTES):
                stop = min(start + READ_BYTES, int(stops[-1]))
                tokens.seek(start * dtype.itemsize)
                block = np.frombuffer(tokens.read((stop - start) * dtype.itemsize), dtype)
                inside = stops[(stops > start) & (stops <= stop)]
                if not (block[inside - 1 - start] == END_ID).all():
                    return False
            first = int(stops[-1])
    return True
