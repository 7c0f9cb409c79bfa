"""A token store's manifest: its format, and the checks of one that may be damaged or hostile."""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import RESERVED
from data_pipelines.store.seal import seal_fault
from data_pipelines.tokenizers import config_fault

FORMAT = "warmstate-token-store"
VERSION = 2  # version 1 had no checksum of the manifest
KINDS = ("tokens", "offsets", "labels")
OFFSET_DTYPE = np.dtype("<i8")
LABEL_DTYPE = np.dtype("<i4")
NO_LABEL = -1
NO_CONTEXT = -1  # an unknown one
MAX_MANIFEST_BYTES = 1 << 28  # some 400,000 shards
MAX_CLASSES = 1 << 20
MAX_CONTEXTS = 100_000
MAX_LABEL_CELLS = 1 << 28  # of the table of label sets, a byte each
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian type of the ids: uint16, or uint32 for large vocabularies."""
    return np.dtype("<u2" if vocab_size <= 65535 else "<u4")


def kinds_of(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Returns the kinds of files that a store's shards have."""
    return (*KINDS, "contexts") if "context_names" in manifest else KINDS


def shards_of(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the entries of all shards, split by split."""
    for split in manifest["splits"].values():
        yield from split["shards"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of the store in `folder`.

    Raises:
        InputError: it is missing, damaged, or not one that `store_writer` writes.
    """
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
        _check(manifest)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Raises KeyError or ValueError unless the manifest is one that `store_writer` writes."""
    for key in ("source", "note", "vocab_sha256"):
        _typed(manifest, key, str)
    _typed(manifest, "prepare_config", dict)
    if fault := config_fault(_typed(manifest, "tokenizer", dict)):
        raise ValueError(fault)
    classes = _count(manifest, "num_classes", MAX_CLASSES)
    names = _names(manifest, "class_names", [""] * classes)  # a store of before has no names
    if len(names) != classes:
        raise ValueError(f"{len(names)} class_names for {classes} classes")
    sets = manifest.get("label_sets", [[]])  # most stores have one label a document
    if not isinstance(sets, list) or not sets or not all(isinstance(each, list) for each in sets):
        raise ValueError("label_sets is not a list of lists")
    if len(sets) * classes > MAX_LABEL_CELLS:
        raise ValueError(f"{len(sets)} label_sets of {classes} classes")
    if any(type(c) is not int or not 0 <= c < classes for each in sets for c in each):
        raise ValueError("label_sets names a class that does not exist")
    contexts = _names(manifest, "context_names", [""])  # most stores have none
    if not 0 < len(contexts) <= MAX_CONTEXTS or len(set(contexts)) < len(contexts):
        raise ValueError(f"{len(contexts)} context_names, or a repeated one")
    if _count(manifest, "vocab_size", 2**31 - 1) < len(RESERVED):
        raise ValueError(f"vocab_size {manifest['vocab_size']}")
    dtype = token_dtype(manifest["vocab_size"])
    if _typed(manifest, "token_dtype", str) != dtype.name:
        raise ValueError(f"token_dtype {manifest['token_dtype']!r} should be {dtype.name!r}")
    _check_file(_typed(manifest, "vocab_file", dict))
    for split, entry in _typed(manifest, "splits", dict).items():
        _check_split(split, entry, dtype, kinds_of(manifest))


def _check_split(split: str, entry: Any, dtype: np.dtype, kinds: tuple[str, ...]) -> None:
    if not _SPLIT_NAME.fullmatch(split):
        raise ValueError(f"split name {split!r}")
    if not isinstance(entry, dict):
        raise ValueError(f"split {split} is not an object")
    shards = _typed(entry, "shards", list)
    for number, shard in enumerate(shards):
        # This also keeps a manifest from naming files outside its folder.
        name = f"{split}-{number:05d}-of-{len(shards):05d}"
        if not isinstance(shard, dict) or shard["name"] != name:
            raise ValueError(f"{name} is missing, or has another name")
        examples, tokens = _count(shard, "examples"), _count(shard, "tokens")
        expected = {
            "tokens": tokens * dtype.itemsize,
            "offsets": (examples + 1) * OFFSET_DTYPE.itemsize,
            "labels": examples * LABEL_DTYPE.itemsize,
            "contexts": examples * LABEL_DTYPE.itemsize,
        }
        for kind in kinds:
            if _check_file(_typed(_typed(shard, "files", dict), kind, dict)) != expected[kind]:
                raise ValueError(f"{name}.{kind} should have {expected[kind]} bytes")
    for count in ("examples", "tokens"):
        if _count(entry, count) != sum(shard[count] for shard in shards):
            raise ValueError(f"split {split}: its shards do not add up to its {count}")


def _names(manifest: dict[str, Any], key: str, missing: list[str]) -> list[str]:
    names = manifest.get(key, missing)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is not a list of names")
    return names


def _check_file(entry: dict[str, Any]) -> int:
    """Returns the bytes of a manifest's entry for a file."""
    _typed(entry, "sha256", str)
    return _count(entry, "bytes")


def _count(mapping: dict[str, Any], key: str, most: int = 2**62) -> int:
    value = _typed(mapping, key, int)
    if not 0 <= value <= most:
        raise ValueError(f"{key} is {value}")
    return value


def _typed(mapping: dict[str, Any], key: str, kind: type) -> Any:
    # Exactly: True is an int, too.
    if type(mapping[key]) is not kind:
        raise ValueError(f"{key} is not of type {kind.__name__}")
    return mapping[key]
