"""Documents of a token store, numbered from 0: whole, sampled, or cut into pieces.

Nothing is held for each document: where it lies is read from the memory maps when it is asked for.
"""

import functools
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.batches.permutation import Permutation
from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID

OFFSET_DTYPE = np.dtype("<i8")
LABEL_DTYPE = np.dtype("<i4")
# What must be searched by its place in a stream keeps 8 bytes for so many documents.
BLOCK_DOCUMENTS = 32
CHUNK_DOCUMENTS = 512 * BLOCK_DOCUMENTS
SAMPLE_KEY = 1


class Located(NamedTuple):
    """Where documents lie.

    Attributes:
        document: their numbers in the whole split, int64 [n].
        start: of their words in the shard's tokens, int64 [n].
        stop: of their words; the end token is not among them, int64 [n].
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class SplitView(ABC):
    """Documents of one or several splits, numbered from 0; made by `TokenStore.split`.

    Memory: O(shards), and for `pieces` a quarter of a byte a document.
    """

    def __init__(self, shards: "Shards") -> None:
        self._shards = shards

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of documents."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens of all documents, end tokens included."""

    @abstractmethod
    def _locate(self, indices: np.ndarray) -> Located:
        """Returns where documents lie, whose numbers are in range: int64 [n]."""

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the tokens of documents, end tokens included: int64 [n].

        Args:
            indices: integers [n] in 0 .. len - 1, in any order.

        Raises:
            IndexError: an index is out of range.
            InputError: the store's offsets are damaged.
        """
        located = self._locate(self._checked(indices))
        return located.stop - located.start + 1

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of documents, -1 for none: int32 [n].

        Raises:
            IndexError: an index is out of range.
        """
        return self._shards.labels(self._locate(self._checked(indices)).document)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Returns how often each id is in all documents, the end token's among them: int64 [ids].

        Args:
            vocab_size: ids are 0 .. vocab_size - 1.
        """
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self), BLOCK_DOCUMENTS):
            documents = np.arange(start, min(start + BLOCK_DOCUMENTS, len(self)))
            lengths = self.lengths_of(documents)
            tokens = self.gather_parts(documents, np.zeros_like(lengths), lengths)
            counts += np.bincount(tokens, minlength=vocab_size)
        return counts

    def document_counts(self, vocab_size: int) -> np.ndarray:
        """Returns how many documents have each id: int64 [ids].

        Args:
            vocab_size: ids are 0 .. vocab_size - 1.
        """
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self), BLOCK_DOCUMENTS):
            documents = np.arange(start, min(start + BLOCK_DOCUMENTS, len(self)))
            lengths = self.lengths_of(documents)
            tokens = self.gather_parts(documents, np.zeros_like(lengths), lengths)
            of_document = np.repeat(np.arange(len(documents)), lengths)
            distinct = np.unique(of_document * vocab_size + tokens)
            counts += np.bincount(distinct % vocab_size, minlength=vocab_size)
        return counts

    def sample(self, documents: int, seed: int) -> "SplitView":
        """Returns a view of `documents` of these, chosen by `seed`, in a random order.

        A smaller sample of the same seed is the start of a larger one.

        Raises:
            ValueError: there are not that many.
        """
        if not 1 <= documents <= len(self):
            raise ValueError(f"{documents} documents were asked for; there are {len(self)}")
        return _Sample(self, documents, seed)

    def pieces(self, max_tokens: int) -> "SplitView":
        """Returns a view in which every longer document is cut into pieces of `max_tokens`.

        The pieces of a document are in order and of equal length, give or take a word; each ends
        with an end token, which counts among its tokens, and has the document's label. Costs one
        pass over the lengths of all documents.

        Args:
            max_tokens: the most tokens of a piece; at least 2.
        """
        return _Pieces(self, max_tokens)

    def reversed(self) -> "SplitView":
        """Returns a view in which every document's words come in reverse, its end token last."""
        return _Reversed(self)

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
            InputError: the store's offsets are damaged.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        located = self._locate(self._checked(indices))
        words = np.minimum(located.stop - located.start, max_tokens - 1)
        longest = int(words.max(initial=-1)) + 1
        width = longest if pad_to is None else pad_to
        if longest > width:
            raise ValueError(f"pad_to={pad_to}, but a document has {longest} tokens")
        tokens = np.full((len(words), width), PADDING_ID, np.int32)
        ends = np.arange(len(words)) * width + words
        self._shards.copy_words(
            located.document, located.stop - words, located.stop, tokens.ravel(), ends - words
        )
        tokens.ravel()[ends] = END_ID
        return tokens, (words + 1).astype(np.int32)

    def gather_parts(
        self, indices: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        """Returns parts of documents, one after the other: int32 [sum of stops - starts].

        Args:
            indices: the documents, integers [n] in 0 .. len - 1, in any order.
            starts: the first token of each part, counted from its document's start, [n].
            stops: the token to stop before, at most the document's length, [n].

        Raises:
            IndexError: a document, or a part of it, does not exist.
            InputError: the store's offsets are damaged.
        """
        located = self._locate(self._checked(indices))
        words = located.stop - located.start
        if np.any((starts < 0) | (stops < starts) | (stops > words + 1)):
            raise IndexError("a part that its document does not have")
        with_end = (stops > words) & (stops > starts)
        tokens = np.empty(int((stops - starts).sum()), np.int32)
        ends = np.cumsum(stops - starts)
        self._shards.copy_words(
            located.document,
            located.start + np.minimum(starts, words),
            located.start + np.minimum(stops, words),
            tokens,
            ends - (stops - starts),
        )
        tokens[ends[with_end] - 1] = END_ID
        return tokens

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"a document outside 0 .. {len(self) - 1}")
        return indices


class WholeSplit(SplitView):
    """Every document of the shards, in stored order."""

    def __len__(self) -> int:
        """Returns the number of documents."""
        return int(self._shards.first[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end tokens included."""
        return self._shards.num_tokens

    def _locate(self, indices: np.ndarray) -> Located:
        start, stop = self._shards.offsets(indices)
        return Located(indices, start, stop - 1)


class _Sample(SplitView):
    """The first `documents` of a permutation of another view."""

    def __init__(self, base: SplitView, documents: int, seed: int) -> None:
        super().__init__(base._shards)
        self._base = base
        self._documents = documents
        self._order = Permutation(len(base), (seed, SAMPLE_KEY))

    def __len__(self) -> int:
        """Returns the number of documents."""
        return self._documents

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of all documents, end tokens included."""
        return sum(int(self.lengths_of(chunk).sum()) for chunk in chunks(len(self)))

    def _locate(self, indices: np.ndarray) -> Located:
        return self._base._locate(self._order(indices))


class _Reversed(SplitView):
    """The documents of another view, last word first: what is cut is cut before."""

    def __init__(self, base: SplitView) -> None:
        super().__init__(base._shards)
        self._base = base

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._base)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end tokens included."""
        return self._base.num_tokens

    def _locate(self, indices: np.ndarray) -> Located:
        return self._base._locate(indices)

    def sample(self, documents: int, seed: int) -> "SplitView":
        return self._base.sample(documents, seed).reversed()

    def pieces(self, max_tokens: int) -> "SplitView":
        return self._base.pieces(max_tokens).reversed()

    def reversed(self) -> "SplitView":
        return self._base

    def gather(
        self, indices: np.ndarray, max_tokens: int, pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = self._base.gather(indices, max_tokens, pad_to)
        places = np.arange(tokens.shape[1])
        words = lengths[:, None] - 1
        source = np.where(places < words, words - 1 - places, places)
        return np.take_along_axis(tokens, source, axis=1), lengths

    def gather_parts(
        self, indices: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        words = self.lengths_of(indices) - 1
        if np.any((starts < 0) | (stops < starts) | (stops > words + 1)):
            raise IndexError("a part that its document does not have")
        first, last = words - np.minimum(stops, words), words - np.minimum(starts, words)
        forward = self._base.gather_parts(indices, first, last)
        tokens = np.full(int((stops - starts).sum()), END_ID, np.int32)
        counts = last - first
        begins = np.cumsum(counts) - counts
        number = np.arange(len(forward)) - np.repeat(begins, counts)  # of a word in its part
        places = np.repeat(np.cumsum(stops - starts) - (stops - starts), counts) + number
        tokens[places] = forward[np.repeat(begins + counts - 1, counts) - number]
        return tokens


class _Pieces(SplitView):
    """The documents of another view, cut."""

    def __init__(self, base: SplitView, max_tokens: int) -> None:
        super().__init__(base._shards)
        self._base = base
        self._max_words = max_tokens - 1
        counts = [
            block_sums(self._count(base.lengths_of(chunk) - 1)) for chunk in chunks(len(base))
        ]
        # Pieces before each block of documents: [blocks + 1].
        self._block_first = np.concatenate([[0], *counts]).cumsum()

    def _count(self, words: np.ndarray) -> np.ndarray:
        return np.maximum(1, -(-words // self._max_words))

    def __len__(self) -> int:
        """Returns the number of pieces."""
        return int(self._block_first[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces, end tokens included."""
        return self._base.num_tokens - len(self._base) + len(self)

    def _locate(self, indices: np.ndarray) -> Located:
        blocks, block_of = np.unique(
            np.searchsorted(self._block_first, indices, side="right") - 1, return_inverse=True
        )
        documents = blocks[:, None] * BLOCK_DOCUMENTS + np.arange(BLOCK_DOCUMENTS)
        # The last block may not be full: its last document again, behind all pieces.
        documents = np.minimum(documents, len(self._base) - 1)
        located = Located(
            *(x.reshape(documents.shape) for x in self._base._locate(documents.ravel()))
        )
        counts = self._count(located.stop - located.start)  # [blocks, BLOCK_DOCUMENTS]
        after = self._block_first[blocks, None] + np.cumsum(counts, axis=1)
        # The document of each piece: the first that the pieces up to its end go beyond.
        place = block_of, (after[block_of] <= indices[:, None]).sum(axis=1)
        document, start, stop = (x[place] for x in located)
        count, words = counts[place], stop - start
        number = indices - (after[place] - count)  # of a piece in its document
        return Located(
            document, start + number * words // count, start + (number + 1) * words // count
        )


class Shards:
    """The memory maps of some shards, and which documents are in which.

    Args:
        folder: of the store.
        entries: the manifest's, of each shard.
        token_dtype: of the tokens on disk.

    Attributes:
        first: the number of each shard's first document, and last of all documents:
            int64 [shards + 1].
        num_tokens: of all shards.
    """

    def __init__(self, folder: Path, entries: list[dict[str, Any]], token_dtype: np.dtype) -> None:
        self._paths = [folder / entry["name"] for entry in entries]
        maps = [
            [_mapped(folder / f"{e['name']}.{kind}", dtype) for e in entries]
            for kind, dtype in (
                ("tokens", token_dtype),
                ("offsets", OFFSET_DTYPE),
                ("labels", LABEL_DTYPE),
            )
        ]
        self._tokens, self._offsets, self._labels = maps
        self.first = np.cumsum([0, *(len(labels) for labels in self._labels)], dtype=np.int64)
        self.num_tokens = sum(len(tokens) for tokens in self._tokens)

    def offsets(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where documents start and stop in their shards' tokens: int64 [n] each.

        Raises:
            InputError: an offset is outside the shard, or a document has no tokens.
        """
        starts, stops = np.empty((2, len(documents)), np.int64)
        for shard, rows, local in self._by_shard(documents):
            start, stop = self._offsets[shard][local], self._offsets[shard][local + 1]
            if start.min() < 0 or (stop - start).min() < 1 or stop.max() > len(self._tokens[shard]):
                raise InputError(
                    f"{self._paths[shard]}.offsets is damaged: a document has no tokens, or lies "
                    "outside the shard; prepare the store again"
                )
            starts[rows], stops[rows] = start, stop
        return starts, stops

    def labels(self, documents: np.ndarray) -> np.ndarray:
        """Returns the labels of documents: int32 [n]."""
        labels = np.empty(len(documents), np.int32)
        for shard, rows, local in self._by_shard(documents):
            labels[rows] = self._labels[shard][local]
        return labels

    def copy_words(
        self,
        documents: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        target: np.ndarray,
        places: np.ndarray,
    ) -> None:
        """Copies tokens [start, stop) of each document's shard to `target` from `place` on."""
        # A loop: one fancy index over all tokens takes as long for short documents and twice as
        # long for those of 400 tokens.
        shard = np.searchsorted(self.first, documents, side="right") - 1
        lists = (x.tolist() for x in (shard, starts, stops, places, places + (stops - starts)))
        tokens = self._tokens
        for number, start, stop, place, end in zip(*lists, strict=True):
            target[place:end] = tokens[number][start:stop]

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


def chunks(num_documents: int) -> Iterator[np.ndarray]:
    """Yields 0 .. num_documents - 1 in parts, for a pass over all: int64 [<= CHUNK_DOCUMENTS]."""
    for start in range(0, num_documents, CHUNK_DOCUMENTS):
        yield np.arange(start, min(start + CHUNK_DOCUMENTS, num_documents))


def block_sums(values: np.ndarray) -> np.ndarray:
    """Returns the sums of blocks of BLOCK_DOCUMENTS values; the last block may be shorter."""
    return np.add.reduceat(values, np.arange(0, len(values), BLOCK_DOCUMENTS))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Returns a file's content as an array that is mapped, not read."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, dtype)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Documents are read in random order: what lies around them is not worth reading ahead.
    content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype)
