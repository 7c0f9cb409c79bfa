"""Tokenizes one part of a source into a draft.

A draft is two files:
  NAME.ids     int32 [tokens]: the documents, each word as some number; 0 ends a document
  NAME.npz     the words, their numbers and frequencies, and each document's length in tokens,
               label and id; written last
A draft's words are the pieces of `piece_numbers`: characters or bytes for those tokenizers.
A draft depends on the part alone and its files are complete or missing: it does not matter which
process makes it, in which order, or whether twice.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.durable import write_file
from data_pipelines.prepare.bad_examples import BadExamples
from data_pipelines.prepare.piece_numbers import PieceNumbers, piece_numbers
from data_pipelines.reserved_ids import END_ID, UNKNOWN_ID
from data_pipelines.sources import BadExample, Example, Source
from data_pipelines.sources.windows import windows
from data_pipelines.store.manifest import NO_LABEL

CHUNK_EXAMPLES = 512  # their bytes fit the cache: NumPy passes over them many times
CHUNK_CHARACTERS = 1 << 20  # a longer document is a chunk by itself
BLOCK_TOKENS = 1 << 22
# Words are UTF-8, or bytes of UTF-8, in which this byte does not occur.
SEPARATOR = b"\xff"

Count = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a source and the name of its files, SPLIT-00003-of-00017."""

    split: str
    part: str
    name: str


def parts_of(source: Source) -> list[Part]:
    """Returns all parts of a source, split by split, in order."""
    parts = []
    for split in source.splits:
        names = source.parts(split)
        parts += [
            Part(split, part, f"{split}-{number:05d}-of-{len(names):05d}")
            for number, part in enumerate(names)
        ]
    return parts


def draft_part(
    folder: Path, source: Source, tokenizer: dict[str, Any], part: Part, count: Count
) -> None:
    """Tokenizes a part and writes its draft.

    Args:
        folder: an existing folder for the draft.
        source: the part's source.
        tokenizer: config of the tokenizer.
        part: the part.
        count: takes the number of documents done since the last call.
    """
    writer = _DraftWriter(folder, part, piece_numbers(tokenizer))

    def blocks() -> Iterator[bytes]:
        good = writer.good(source.examples(part.split, part.part))
        for chunk in windows(good, CHUNK_EXAMPLES, CHUNK_CHARACTERS):
            yield writer.add(chunk).tobytes()
            count(len(chunk))

    write_file(folder / f"{part.name}.ids", blocks())
    writer.finish()


class _DraftWriter:
    """Collects the facts about a part while it is read."""

    def __init__(self, folder: Path, part: Part, numbers: PieceNumbers) -> None:
        self._path = folder / f"{part.name}.npz"
        self._bad = BadExamples()
        self._numbers = numbers
        numbers.begin_part()
        self._counts = np.zeros(1, np.int64)  # [numbers]
        self._lengths, self._labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        self._hashes = [np.zeros(0, np.uint64)]
        self._ids: list[bytes] = []
        self._contexts: list[bytes] = []

    def good(self, examples: Iterable[Example | BadExample]) -> Iterator[Example]:
        """Yields the usable examples and counts the others."""
        for example in examples:
            if isinstance(example, BadExample):
                self._bad.add(example.where, example.why)
            else:
                yield example

    def add(self, examples: list[Example]) -> np.ndarray:
        """Returns int32 [tokens]: the documents in this part's numbers."""
        ids, lengths = self._numbers.numbers([example.text for example in examples])
        counts = np.bincount(ids, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        self._lengths.append(lengths)
        labels = [NO_LABEL if e.label is None else e.label for e in examples]
        self._labels.append(np.array(labels, np.int32))
        self._hashes.append(id_hashes([e.id for e in examples]))
        self._ids += [e.id.encode("utf-8", "surrogatepass") for e in examples]
        self._contexts += [e.context.encode() for e in examples]
        return ids

    def finish(self) -> None:
        """Writes NAME.npz."""

        def joined(words: Iterable[bytes]) -> np.ndarray:
            return np.frombuffer(SEPARATOR.join(words), np.uint8)

        self._counts[0] = 0  # the end of a document
        numbers = np.flatnonzero(self._counts)
        bad = {"first": self._bad.first, "reasons": dict(self._bad.reasons)}
        arrays = {
            "words": joined(self._numbers.pieces(numbers.tolist())),
            "numbers": numbers.astype(np.int32),
            "counts": self._counts[numbers],
            "lengths": np.concatenate(self._lengths),
            "labels": np.concatenate(self._labels),
            "id_hashes": np.concatenate(self._hashes),
            "ids": joined(self._ids),
            "contexts": joined(self._contexts),
            "bad_examples": np.frombuffer(json.dumps(bad).encode(), np.uint8),
        }
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write_file(self._path, [buffer.getvalue()])


class Draft:
    """Reads a part's draft, each array when it is asked for."""

    def __init__(self, folder: Path, part: Part) -> None:
        self.part = part
        self._ids_path = folder / f"{part.name}.ids"
        self._path = folder / f"{part.name}.npz"

    def array(self, name: str) -> np.ndarray:
        """Returns numbers or counts [words], or lengths, labels or id_hashes [documents]."""
        with np.load(self._path, allow_pickle=False) as arrays:
            return arrays[name]

    @functools.cached_property
    def num_examples(self) -> int:
        """The number of documents, without the bad ones."""
        return len(self.array("labels"))

    def counts_without(self, dropped: tuple[int, ...]) -> np.ndarray:
        """Returns the frequency of each word without the dropped documents: int64 [words]."""
        counts, numbers = self.array("counts"), self.array("numbers")
        stops = np.cumsum(self.array("lengths"))
        for number in dropped:
            start = int(stops[number - 1]) if number else 0
            for block in self.token_blocks(start, int(stops[number])):
                counts -= np.bincount(block, minlength=int(numbers[-1]) + 1)[numbers]
        return counts

    def words(self) -> list[bytes]:
        """Returns the part's words [words]."""
        joined = self.array("words").tobytes()
        return joined.split(SEPARATOR) if joined else []

    def new_ids(self, ids: Mapping[bytes, int]) -> np.ndarray:
        """Returns the id of each of the draft's numbers: int32 [numbers]."""
        numbers = self.array("numbers")
        new_ids = np.full(int(numbers.max(initial=0)) + 1, UNKNOWN_ID, np.int32)
        new_ids[0] = END_ID
        new_ids[numbers] = [ids.get(word, UNKNOWN_ID) for word in self.words()]
        return new_ids

    def example_ids(self) -> list[str]:
        """Returns the documents' ids [documents]."""
        ids = self.array("ids").tobytes().split(SEPARATOR)
        return [i.decode("utf-8", "surrogatepass") for i in ids]

    def contexts(self) -> list[str]:
        """Returns the documents' contexts [documents]."""
        found = self.array("contexts").tobytes().split(SEPARATOR)
        return [context.decode() for context in found]

    def bad_examples(self) -> dict[str, Any]:
        """Returns the arguments of `BadExamples.merge`."""
        return json.loads(self.array("bad_examples").tobytes())

    def token_blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields tokens start .. stop - 1 as blocks of the draft's numbers, int32 [tokens]."""
        with self._ids_path.open("rb") as file:
            file.seek(4 * start)
            for at in range(start, stop, BLOCK_TOKENS):
                yield np.fromfile(file, np.int32, min(BLOCK_TOKENS, stop - at))


def id_hashes(ids: list[str]) -> np.ndarray:
    """Returns a 64-bit hash of each id: uint64 [documents]."""
    digests = [
        hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids
    ]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def find_duplicates(drafts: Sequence[Draft]) -> dict[str, tuple[int, ...]]:
    """Returns, by the part's name, the documents whose id an earlier document has.

    Compares hashes first, and ids only if hashes are equal.
    """
    hashes = [draft.array("id_hashes") for draft in drafts]
    flat = np.concatenate([np.zeros(0, np.uint64), *hashes])
    ordered = np.sort(flat)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    seen: set[str] = set()
    dropped = {}
    for draft, values in zip(drafts, hashes, strict=True):
        candidates = np.flatnonzero(np.isin(values, repeated)).tolist() if len(repeated) else []
        if not candidates:
            continue
        ids = draft.example_ids()
        numbers = []
        for number in candidates:
            if ids[number] in seen:
                numbers.append(number)
            seen.add(ids[number])
        if numbers:
            dropped[draft.part.name] = tuple(numbers)
    return dropped
