"""Shards of a token store, memory-mapped; tokens that are not on this disk are read when needed."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.store import truncation
from data_pipelines.store.manifest import LABEL_DTYPE, OFFSET_DTYPE
from data_pipelines.store.remote_tokens import RemoteTokens


class Shards:
    """Some shards.

    Args:
        folder: the store's.
        entries: the manifest's entries of the shards.
        token_dtype: type of the tokens on disk.
        remote: has the tokens of the shards whose files the folder lacks.

    Attributes:
        first: the number of each shard's first document, then the number of documents:
            int64 [shards + 1].
        num_tokens: tokens of all shards.
        has_contexts: whether documents have contexts.
        is_remote: whether some tokens are not in the folder.
    """

    def __init__(
        self,
        folder: Path,
        entries: list[dict[str, Any]],
        token_dtype: np.dtype,
        remote: RemoteTokens | None = None,
    ) -> None:
        self._paths = [folder / entry["name"] for entry in entries]
        kinds: dict[str, np.dtype] = {"offsets": OFFSET_DTYPE, "labels": LABEL_DTYPE}
        self.has_contexts = bool(entries) and "contexts" in entries[0]["files"]
        if self.has_contexts:
            kinds["contexts"] = LABEL_DTYPE
        self._maps = {
            kind: [_mapped(folder / f"{e['name']}.{kind}", dtype) for e in entries]
            for kind, dtype in kinds.items()
        }
        self._offsets, self._remote = self._maps["offsets"], remote
        files = [path.with_name(f"{path.name}.tokens") for path in self._paths]
        self._tokens = [
            None if remote and not file.exists() else _mapped(file, token_dtype) for file in files
        ]
        self.is_remote = any(tokens is None for tokens in self._tokens)
        self.first = np.cumsum(
            [0, *(len(labels) for labels in self._maps["labels"])], dtype=np.int64
        )
        self._num_tokens = [entry["tokens"] for entry in entries]
        self.num_tokens = sum(self._num_tokens)

    def offsets(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the start and stop of documents in their shards' tokens: int64 [n] each.

        Raises:
            InputError: an offset is outside the shard, or a document has no tokens.
        """
        starts, stops = np.empty((2, len(documents)), np.int64)
        for shard, rows, local in self._by_shard(documents):
            start, stop = self._offsets[shard][local], self._offsets[shard][local + 1]
            if start.min() < 0 or (stop - start).min() < 1 or stop.max() > self._num_tokens[shard]:
                raise InputError(
                    f"{self._paths[shard]}.offsets is damaged: a document has no tokens, or lies "
                    "outside the shard; prepare the store again"
                )
            starts[rows], stops[rows] = start, stop
        return starts, stops

    def numbers(self, kind: str, documents: np.ndarray) -> np.ndarray:
        """Returns the "labels" or "contexts" of documents: int32 [n]."""
        numbers = np.empty(len(documents), np.int32)
        for shard, rows, local in self._by_shard(documents):
            numbers[rows] = self._maps[kind][shard][local]
        return numbers

    def words(
        self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> list[np.ndarray]:
        """Returns tokens [start, stop) of the shard of each document."""
        shards = (np.searchsorted(self.first, documents, side="right") - 1).tolist()
        ranges = list(zip(shards, starts.tolist(), stops.tolist(), strict=True))
        if not self._remote or not self.is_remote:
            return [self._tokens[shard][start:stop] for shard, start, stop in ranges]
        far = [(self._paths[n].name, *ab) for n, *ab in ranges if self._tokens[n] is None]
        fetched = iter(self._remote.read(far) if far else ())
        near = ((self._tokens[shard], start, stop) for shard, start, stop in ranges)
        return [next(fetched) if t is None else t[start:stop] for t, start, stop in near]

    def _by_shard(
        self, documents: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray | slice, np.ndarray]]:
        """Yields each shard, which of `documents` are in it, and their numbers inside it."""
        if not len(documents):
            return
        shard = np.searchsorted(self.first, documents, side="right") - 1
        if (shard == shard[0]).all():
            yield int(shard[0]), slice(None), documents - self.first[shard[0]]
            return
        order = np.argsort(shard, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            number = int(shard[rows[0]])
            yield number, rows, documents[rows] - self.first[number]


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Returns a file's content as a memory-mapped array."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size == 0:  # cannot be mapped
            return np.empty(0, dtype)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    truncation.watch(path, size)
    # Documents are read in random order: reading ahead would load their neighbours in vain.
    content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype)
