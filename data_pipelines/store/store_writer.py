"""Writes a token store: first the shards, which processes may write in parallel, then the rest."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.durable import flush_folder, write_file
from data_pipelines.store.manifest import (
    FORMAT,
    LABEL_DTYPE,
    OFFSET_DTYPE,
    VERSION,
    token_dtype,
)
from data_pipelines.store.seal import with_seal


def write_shard(
    folder: Path,
    name: str,
    token_blocks: Iterable[np.ndarray],
    lengths: np.ndarray,
    labels: np.ndarray,
    dtype: np.dtype,
    contexts: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes one shard's files.

    Args:
        folder: an existing folder.
        name: SPLIT-00003-of-00017.
        token_blocks: the ids, sum(lengths) of them, in blocks [tokens of the block].
        lengths: tokens of each document, including its end token [examples].
        labels: label of each document, -1 for none [examples].
        dtype: type of the ids on disk, from `token_dtype`.
        contexts: context of each document, -1 for an unknown one [examples]; None without.

    Returns:
        The manifest's entry for the shard.

    Raises:
        ValueError: the number of tokens differs from the sum of the lengths.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(OFFSET_DTYPE)
    files = {
        "tokens": write_file(
            folder / f"{name}.tokens", (block.astype(dtype).tobytes() for block in token_blocks)
        ),
        "offsets": write_file(folder / f"{name}.offsets", [offsets.tobytes()]),
        "labels": write_file(folder / f"{name}.labels", [labels.astype(LABEL_DTYPE).tobytes()]),
    }
    if contexts is not None:
        data = contexts.astype(LABEL_DTYPE).tobytes()
        files["contexts"] = write_file(folder / f"{name}.contexts", [data])
    tokens = int(offsets[-1])
    if files["tokens"]["bytes"] != tokens * dtype.itemsize:
        raise ValueError(f"shard {name}: {files['tokens']['bytes']} bytes for {tokens} tokens")
    return {"name": name, "examples": len(labels), "tokens": tokens, "files": files}


def finish_store(
    building: Path,
    folder: Path,
    vocab: bytes,
    facts: Mapping[str, Any],
    shards: Mapping[str, list[dict[str, Any]]],
    bad_examples: Mapping[str, int] | None = None,
) -> None:
    """Writes the vocabulary and the manifest, and renames `building` to `folder`.

    Removes other files of `building`.

    Args:
        building: holds the files of all shards.
        folder: the store's, on the same file system; does not exist, or is empty.
        vocab: the contents of vocab.txt.
        facts: the manifest's `source`, `note`, `num_classes`, `tokenizer`, `vocab_size`,
            `vocab_sha256`, `prepare_config` and, if documents have contexts, `context_names`.
        shards: the results of `write_shard`, by split, in order.
        bad_examples: documents left out, by split.
    """
    splits = {
        split: {
            "examples": sum(entry["examples"] for entry in entries),
            "tokens": sum(entry["tokens"] for entry in entries),
            "bad_examples": (bad_examples or {}).get(split, 0),
            "shards": entries,
        }
        for split, entries in shards.items()
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "vocab_file": write_file(building / "vocab.txt", [vocab]),
        "token_dtype": token_dtype(facts["vocab_size"]).name,
        "splits": splits,
    }
    text = json.dumps(with_seal(manifest), indent=1, ensure_ascii=False) + "\n"
    write_file(building / "manifest.json", [text.encode()])
    wanted = {"vocab.txt", "manifest.json"} | {
        f"{entry['name']}.{kind}"
        for entries in shards.values()
        for entry in entries
        for kind in entry["files"]
    }
    for path in building.iterdir():
        if path.name not in wanted:
            path.unlink()
    flush_folder(building)
    os.rename(building, folder)
    flush_folder(folder.parent)
