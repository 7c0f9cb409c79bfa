"""Views of a token store's documents, numbered from 0: whole, sampled, or cut into pieces.

A view keeps nothing for each document: it looks up its place in the memory maps when asked.
"""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines.permutation import Permutation
from data_pipelines.reserved_ids import END_ID, PADDING_ID
from data_pipelines.store.shards import Shards

# Indexes into a stream of tokens keep 8 bytes for so many documents.
BLOCK_DOCUMENTS = 32
CHUNK_DOCUMENTS = 512 * BLOCK_DOCUMENTS
SAMPLE_KEY = 1


class Located(NamedTuple):
    """The places of documents."""

    document: np.ndarray  # numbers in the whole split, int64 [n]
    start: np.ndarray  # start of the words in the shard's tokens, int64 [n]
    stop: np.ndarray  # end of the words, before the end token, int64 [n]


class SplitView(ABC):
    """Documents of one or several splits, numbered from 0; made by `TokenStore.split`.

    Memory: O(shards), and for `pieces` a quarter of a byte a document.
    """

    def __init__(self, shards: Shards, is_reversed: bool = False) -> None:
        self._shards = shards
        self._is_reversed = is_reversed

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of documents."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens of all documents, including end tokens."""

    @abstractmethod
    def _locate(self, indices: np.ndarray) -> Located:
        """Returns the places of documents whose numbers, int64 [n], are in range."""

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the tokens of documents, end tokens included: int64 [n].

        Args:
            indices: integers [n] in 0 .. len - 1, in any order.

        Raises:
            IndexError: an index is out of range.
            InputError: the store's offsets are damaged.
        """
        located = self.located(indices)
        return located.stop - located.start + 1

    def located(self, indices: np.ndarray) -> Located:
        """Returns the places of documents, for `gather_located` and `numbers`.

        Raises:
            IndexError: an index is out of range.
            InputError: the store's offsets are damaged.
        """
        return self._locate(self._checked(indices))

    def numbers(self, kind: str, located: Located) -> np.ndarray:
        """Returns the "labels" or "contexts" of documents, -1 for none: int32 [n]."""
        return self._shards.numbers(kind, located.document)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of documents, -1 for none: int32 [n]; see `lengths_of`."""
        return self.numbers("labels", self.located(indices))

    @property
    def is_remote(self) -> bool:
        """Whether some tokens are read from an address, not from this disk."""
        return self._shards.is_remote

    @property
    def has_contexts(self) -> bool:
        """Whether documents have contexts."""
        return self._shards.has_contexts

    def contexts_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the contexts of documents, -1 for unknown ones: int32 [n]; see `lengths_of`."""
        return self.numbers("contexts", self.located(indices))

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Returns the frequency of each id in all documents: int64 [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for _, tokens in self._blocks():
            counts += np.bincount(tokens, minlength=vocab_size)
        return counts

    def document_counts(self, vocab_size: int) -> np.ndarray:
        """Returns how many documents have each id: int64 [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for document, tokens in self._blocks():
            distinct = np.unique(document * vocab_size + tokens)
            counts += np.bincount(distinct % vocab_size, minlength=vocab_size)
        return counts

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields, for a block of documents at a time, each token's document in it and its id."""
        for start in range(0, len(self), BLOCK_DOCUMENTS):
            documents = np.arange(start, min(start + BLOCK_DOCUMENTS, len(self)))
            lengths = self.lengths_of(documents)
            tokens = self.gather_parts(documents, np.zeros_like(lengths), lengths)
            yield np.repeat(documents - start, lengths), tokens

    def sample(self, documents: int, seed: int) -> "SplitView":
        """Returns a view of `documents` random documents, in random order.

        A smaller sample of the same seed is the start of a larger one.

        Raises:
            ValueError: the view has fewer.
        """
        if not 1 <= documents <= len(self):
            raise ValueError(f"{documents} documents were asked for; there are {len(self)}")
        return _Sample(self, documents, seed)

    def pieces(self, max_tokens: int) -> "SplitView":
        """Returns a view in which longer documents are cut into pieces of at most `max_tokens`.

        The pieces of a document are in order and of equal length, within one word. Each ends with
        an end token, which counts, and has the document's label. Costs one pass over the lengths
        of all documents.

        Args:
            max_tokens: at least 2.
        """
        return _Pieces(self, max_tokens)

    def reversed(self) -> "SplitView":
        """Returns a view with the words of each document reversed, the end token last."""
        view = copy.copy(self)
        view._is_reversed = not self._is_reversed
        return view

    def gather(
        self, indices: np.ndarray, max_tokens: int, pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the LAST `max_tokens` tokens of some documents.

        Args:
            indices: integers [n] in 0 .. len - 1, in any order.
            max_tokens: at least 1.
            pad_to: width of the result; None means the longest document's, after cutting.

        Returns:
            tokens int32 [n, pad_to], right-padded with 0, and lengths int32 [n].

        Raises:
            IndexError: an index is out of range.
            ValueError: a (cut) document is longer than `pad_to`, or max_tokens < 1.
            InputError: the store's offsets are damaged.
        """
        return self.gather_located(self.located(indices), max_tokens, pad_to)

    def gather_located(
        self, located: Located, max_tokens: int, pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the LAST `max_tokens` tokens of documents; see `gather`."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        words = np.minimum(located.stop - located.start, max_tokens - 1)
        longest = int(words.max(initial=-1)) + 1
        width = longest if pad_to is None else pad_to
        if longest > width:
            raise ValueError(f"pad_to={pad_to}, but a document has {longest} tokens")
        tokens = np.full((len(words), width), PADDING_ID, np.int32)
        ends = np.arange(len(words)) * width + words
        self._copy_words(located, located.stop - words, located.stop, tokens.ravel(), ends - words)
        tokens.ravel()[ends] = END_ID
        return tokens, (words + 1).astype(np.int32)

    def gather_parts(
        self, indices: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        """Returns parts of documents, concatenated: int32 [sum of stops - starts].

        Args:
            indices: the documents, integers [n] in 0 .. len - 1, in any order.
            starts: first token of each part, counted from its document's start, [n].
            stops: end of each part, exclusive, at most the document's length, [n].

        Raises:
            IndexError: a document, or a part of it, does not exist.
            InputError: the store's offsets are damaged.
        """
        located = self.located(indices)
        words = located.stop - located.start
        if np.any((starts < 0) | (stops < starts) | (stops > words + 1)):
            raise IndexError("a part that its document does not have")
        with_end = (stops > words) & (stops > starts)
        tokens = np.empty(int((stops - starts).sum()), np.int32)
        ends = np.cumsum(stops - starts)
        places = ends - (stops - starts)
        first, last = np.minimum(starts, words), np.minimum(stops, words)
        if self._is_reversed:
            first, last = words - last, words - first
        self._copy_words(located, located.start + first, located.start + last, tokens, places)
        tokens[ends[with_end] - 1] = END_ID
        return tokens

    def _copy_words(
        self,
        located: Located,
        starts: np.ndarray,
        stops: np.ndarray,
        target: np.ndarray,
        places: np.ndarray,
    ) -> None:
        """Copies tokens [start, stop) of each document's shard to `target`, at `place`."""
        # A loop: one fancy index over all tokens takes as long for short documents, and twice as
        # long for documents of 400 tokens.
        ends = places + (stops - starts)
        documents = self._shards.words(located.document, starts, stops)
        for words, place, end in zip(documents, places.tolist(), ends.tolist(), strict=True):
            target[place:end] = words[::-1] if self._is_reversed else words

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"a document outside 0 .. {len(self) - 1}")
        return indices


class WholeSplit(SplitView):
    """Every document of the shards, in stored order."""

    def __len__(self) -> int:
        return int(self._shards.first[-1])

    @property
    def num_tokens(self) -> int:
        return self._shards.num_tokens

    def _locate(self, indices: np.ndarray) -> Located:
        start, stop = self._shards.offsets(indices)
        return Located(indices, start, stop - 1)


class _Sample(SplitView):
    """The first `documents` of a permutation of another view."""

    def __init__(self, base: SplitView, documents: int, seed: int) -> None:
        super().__init__(base._shards, base._is_reversed)
        self._base = base
        self._documents = documents
        self._order = Permutation(len(base), (seed, SAMPLE_KEY))

    def __len__(self) -> int:
        return self._documents

    @functools.cached_property
    def num_tokens(self) -> int:
        return sum(int(self.lengths_of(chunk).sum()) for chunk in chunks(len(self)))

    def _locate(self, indices: np.ndarray) -> Located:
        return self._base._locate(self._order(indices))


class _Pieces(SplitView):
    """The documents of another view, cut."""

    def __init__(self, base: SplitView, max_tokens: int) -> None:
        super().__init__(base._shards, base._is_reversed)
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
        return int(self._block_first[-1])

    @property
    def num_tokens(self) -> int:
        return self._base.num_tokens - len(self._base) + len(self)

    def _locate(self, indices: np.ndarray) -> Located:
        blocks, block_of = np.unique(
            np.searchsorted(self._block_first, indices, side="right") - 1, return_inverse=True
        )
        documents = blocks[:, None] * BLOCK_DOCUMENTS + np.arange(BLOCK_DOCUMENTS)
        # The last block may not be full: repeat its last document behind all pieces.
        documents = np.minimum(documents, len(self._base) - 1)
        located = Located(
            *(x.reshape(documents.shape) for x in self._base._locate(documents.ravel()))
        )
        counts = self._count(located.stop - located.start)  # [blocks, BLOCK_DOCUMENTS]
        after = self._block_first[blocks, None] + np.cumsum(counts, axis=1)
        # The document of each piece is the first whose pieces end after it.
        place = block_of, (after[block_of] <= indices[:, None]).sum(axis=1)
        document, start, stop = (x[place] for x in located)
        count, words = counts[place], stop - start
        number = indices - (after[place] - count)  # of a piece in its document
        return Located(
            document, start + number * words // count, start + (number + 1) * words // count
        )


def chunks(num_documents: int) -> Iterator[np.ndarray]:
    """Yields 0 .. num_documents - 1 in chunks of int64 [at most CHUNK_DOCUMENTS]."""
    for start in range(0, num_documents, CHUNK_DOCUMENTS):
        yield np.arange(start, min(start + CHUNK_DOCUMENTS, num_documents))


def block_sums(values: np.ndarray) -> np.ndarray:
    """Returns the sums of blocks of BLOCK_DOCUMENTS values; the last block may be shorter."""
    return np.add.reduceat(values, np.arange(0, len(values), BLOCK_DOCUMENTS))
