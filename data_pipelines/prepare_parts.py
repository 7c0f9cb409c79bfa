"""What `prepare` does to one part of a source: its text -> a draft -> a shard.

Each step is a function of its arguments alone and leaves its result as files that appear whole or
not at all. So it does not matter which process does it, in which order, or whether twice.

A draft is two files:
  NAME.ids     int32 [tokens]: the documents one after the other, each word as some number; each
               document ends with 0
  NAME.npz     the words, the number of each and how often it was seen, and of each document its
               length in tokens, its label and its id; written last
"""

import dataclasses
import functools
import hashlib
import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.quiet_tensorflow import import_quietly
from data_pipelines.reserved_ids import END_ID, UNKNOWN_ID
from data_pipelines.sources import BadExample, Example, Source
from data_pipelines.store_writer import write_file, write_shard
from data_pipelines.token_store import NO_LABEL

CHUNK_EXAMPLES = 512
CHUNK_CHARACTERS = 1 << 21  # a document longer than that is a chunk of its own
BLOCK_TOKENS = 1 << 22
REPORTED_EXAMPLES = 20
# Words are UTF-8, in which this byte does not occur.
SEPARATOR = b"\xff"
MAX_PIECES = 1 << 21  # that a `WordTable` keeps from part to part; about 500 MB
# The line breaks of `tokenizer.py`, where RE2's \s is these five.
_LINE_BREAK = re.compile(r"(?i:<[\t\n\f\r ]*/?[\t\n\f\r ]*br[\t\n\f\r ]*/?[\t\n\f\r ]*>)")

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


class BadExamples:
    """Counts bad examples; keeps the first and how many there are of each reason."""

    def __init__(self) -> None:
        self.first: list[tuple[str, str]] = []
        self.reasons: Counter[str] = Counter()

    def add(self, where: str, why: str) -> None:
        if len(self.first) < REPORTED_EXAMPLES:
            self.first.append((where, why))
        self.reasons[_reason(why)] += 1

    def merge(self, first: Iterable[tuple[str, str]], reasons: Mapping[str, int]) -> None:
        """Adds those of a part: its first ones, and its counts by reason."""
        self.first += list(first)[: REPORTED_EXAMPLES - len(self.first)]
        self.reasons.update(reasons)

    def by_count(self) -> list[tuple[str, int]]:
        """Returns the most frequent reasons with their counts, at most REPORTED_EXAMPLES."""
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ordered[:REPORTED_EXAMPLES]

    def __len__(self) -> int:
        return self.reasons.total()


def _reason(why: str) -> str:
    """Returns why without its values, so that like is counted with like."""
    return re.sub(r"'.*?'|(?<![\w-])\d[\da-fA-Fx]*", "...", why)


def draft_part(
    folder: Path, source: Source, tokenizer: dict[str, Any], part: Part, count: Count
) -> None:
    """Tokenizes a part and writes its draft.

    Args:
        folder: for the draft; it exists.
        source: whose part it is.
        tokenizer: config of the tokenizer.
        part: which.
        count: is called with numbers of documents that are done, now and then.
    """
    writer = _DraftWriter(folder, part, word_table(**tokenizer))

    def blocks() -> Iterator[bytes]:
        for chunk in _chunks(writer.good(source.examples(part.split, part.part))):
            yield writer.add(chunk).tobytes()
            count(len(chunk))

    write_file(folder / f"{part.name}.ids", blocks())
    writer.finish()


class _DraftWriter:
    """What is known of a part while it is read."""

    def __init__(self, folder: Path, part: Part, table: "WordTable") -> None:
        self._path = folder / f"{part.name}.npz"
        self._bad = BadExamples()
        self._table = table
        table.begin_part()
        self._counts = np.zeros(1, np.int64)  # [words of the table]
        self._lengths, self._labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        self._hashes, self._ids = [np.zeros(0, np.uint64)], []

    def good(self, examples: Iterable[Example | BadExample]) -> Iterator[Example]:
        for example in examples:
            if isinstance(example, BadExample):
                self._bad.add(example.where, example.why)
            else:
                yield example

    def add(self, examples: list[Example]) -> np.ndarray:
        """Returns int32 [tokens]: the documents in this part's numbers."""
        ids, lengths = self._table.numbers([example.text for example in examples])
        counts = np.bincount(ids, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        self._lengths.append(lengths)
        labels = [NO_LABEL if e.label is None else e.label for e in examples]
        self._labels.append(np.array(labels, np.int32))
        self._hashes.append(id_hashes([e.id for e in examples]))
        self._ids += [e.id.encode("utf-8", "surrogatepass") for e in examples]
        return ids

    def finish(self) -> None:
        def joined(words: Iterable[bytes]) -> np.ndarray:
            return np.frombuffer(SEPARATOR.join(words), np.uint8)

        self._counts[0] = 0  # the end of a document is no word
        words, numbers = self._table.words(), np.flatnonzero(self._counts)
        bad = {"first": self._bad.first, "reasons": dict(self._bad.reasons)}
        arrays = {
            "words": joined([words[number] for number in numbers]),
            "numbers": numbers.astype(np.int32),
            "counts": self._counts[numbers],
            "lengths": np.concatenate(self._lengths),
            "labels": np.concatenate(self._labels),
            "id_hashes": np.concatenate(self._hashes),
            "ids": joined(self._ids),
            "bad_examples": np.frombuffer(json.dumps(bad).encode(), np.uint8),
        }
        write_file(self._path, _npz(arrays))


def _npz(arrays: dict[str, np.ndarray]) -> list[bytes]:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return [buffer.getvalue()]


class Draft:
    """A part's draft, opened: each array is read when it is asked for."""

    def __init__(self, folder: Path, part: Part) -> None:
        self.part = part
        self._ids_path = folder / f"{part.name}.ids"
        self._path = folder / f"{part.name}.npz"

    def array(self, name: str) -> np.ndarray:
        """Returns one of numbers and counts [words], lengths, labels, id_hashes [documents]."""
        with np.load(self._path, allow_pickle=False) as arrays:
            return arrays[name]

    @functools.cached_property
    def num_examples(self) -> int:
        """The number of documents, without the bad ones."""
        return len(self.array("labels"))

    def counts_without(self, dropped: tuple[int, ...]) -> np.ndarray:
        """Returns how often each word is seen, dropped documents left out: int64 [words]."""
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
        """Returns the ids of the draft's numbers, of which 0 is the end: int32 [numbers]."""
        numbers = self.array("numbers")
        new_ids = np.full(int(numbers.max(initial=0)) + 1, UNKNOWN_ID, np.int32)
        new_ids[0] = END_ID
        new_ids[numbers] = [ids.get(word, UNKNOWN_ID) for word in self.words()]
        return new_ids

    def example_ids(self) -> list[str]:
        """Returns the documents' ids [documents]."""
        ids = self.array("ids").tobytes().split(SEPARATOR)
        return [i.decode("utf-8", "surrogatepass") for i in ids]

    def bad_examples(self) -> dict[str, Any]:
        """Returns the `first` bad ones, as pairs (where, why), and counts by `reasons`."""
        return json.loads(self.array("bad_examples").tobytes())

    def token_blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields tokens start .. stop - 1 in the draft's numbers, in pieces int32 [tokens]."""
        with self._ids_path.open("rb") as file:
            file.seek(4 * start)
            for at in range(start, stop, BLOCK_TOKENS):
                yield np.fromfile(file, np.int32, min(BLOCK_TOKENS, stop - at))


def shard_part(drafts: Path, folder: Path, vocab: Path, task: "ShardTask", count: Count) -> None:
    """Writes a part's shard from its draft, and NAME.json, the manifest's entry for it, last.

    Args:
        drafts: holds the draft.
        folder: for the shard; it exists.
        vocab: vocab.txt.
        task: which.
        count: as in `draft_part`.
    """
    draft = Draft(drafts, task.part)
    new_ids = draft.new_ids(_ids_of_words(vocab))
    lengths, labels = draft.array("lengths"), draft.array("labels")
    kept = np.delete(np.arange(len(lengths)), task.dropped)
    entry = write_shard(
        folder,
        task.name,
        (new_ids[block] for block in _kept_blocks(draft, lengths, task.dropped)),
        lengths[kept],
        labels[kept],
        np.dtype(task.dtype),
    )
    write_file(folder / f"{task.name}.json", [json.dumps(entry).encode()])
    count(len(kept))


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A part's shard.

    Attributes:
        part: whose.
        name: the shard's.
        dropped: documents of the part that are left out.
        dtype: of the ids.
    """

    part: Part
    name: str
    dropped: tuple[int, ...]
    dtype: str


def _kept_blocks(
    draft: Draft, lengths: np.ndarray, dropped: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Yields the part's tokens, in the draft's numbers, without those of the dropped documents."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    first = 0
    for number in (*dropped, len(lengths)):
        yield from draft.token_blocks(offsets[first], offsets[number])
        first = number + 1


def write_vocabulary(
    folder: Path, tokenizer: dict[str, Any], words: list[str], count: Count
) -> None:
    """Writes vocab.txt, and vocabulary.json: what a store's manifest says of it.

    Args:
        folder: where.
        tokenizer: its config.
        words: without the reserved ones, in order.
        count: not called.
    """
    import_quietly()
    from data_pipelines.tokenizer import WordTokenizer

    made = WordTokenizer(words, tokenizer["lowercase"])
    facts = {
        "tokenizer": made.config(),
        "vocab_size": made.vocab_size,
        "vocab_sha256": made.sha256,
    }
    write_file(folder / "vocab.txt", [made.vocab_bytes])
    write_file(folder / "vocabulary.json", [json.dumps(facts).encode()])


@functools.lru_cache(maxsize=1)
def _ids_of_words(vocab: Path) -> dict[bytes, int]:
    return {word: i for i, word in enumerate(vocab.read_bytes().split(b"\n")[:-1])}


def id_hashes(ids: list[str]) -> np.ndarray:
    """Returns a 64-bit hash of each id: uint64 [documents]."""
    digests = [
        hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids
    ]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        characters += len(example.text)
        if len(chunk) == CHUNK_EXAMPLES or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _Numbers(dict):
    """Numbers keys in order of appearance: numbers[key] is key's, a new one if it has none."""

    def __init__(self) -> None:
        self.new: list[Any] = []  # keys numbered since the caller last emptied it

    def __missing__(self, key: Any) -> int:
        number = self[key] = len(self)
        self.new.append(key)
        return number


class WordTable:
    """Turns documents into numbers of their words; a process keeps it from part to part.

    What stands between white space is split into words once and then looked up, which is cheaper
    than splitting it again: of a hundred such pieces a few are new. Words never reach across white
    space, so the words are those of `WordTokenizer.split`.

    Args:
        split: from pieces, as UTF-8, to their words one after the other, and how many each has
            [pieces].
    """

    def __init__(self, split: Callable[[list[bytes]], tuple[list[bytes], np.ndarray]]) -> None:
        self._split = split
        self._forget()

    def _forget(self) -> None:
        self._words = _Numbers()
        assert self._words[b""] == 0  # no word is empty, so 0 is free for the end of a document
        self._pieces = _Numbers()
        self._piece_words = array("i")  # of all pieces, one after the other
        self._piece_stops = array("q", [0])  # [1 + pieces]: where they end in `_piece_words`

    def begin_part(self) -> None:
        """Forgets all words if they are very many. Numbers are the same until the next call."""
        if len(self._pieces) > MAX_PIECES:
            self._forget()

    def words(self) -> list[bytes]:
        """Returns the words by number; the first is empty."""
        return list(self._words)

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 [words + documents], each document followed by 0, and their lengths."""
        try:
            return self._look_up(texts)
        except BaseException:
            self._forget()  # pieces may have numbers, but no words yet
            raise

    def _look_up(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [(_LINE_BREAK.sub(" ", text) if "<" in text else text).split() for text in texts]
        pieces = np.fromiter(
            map(self._pieces.__getitem__, chain.from_iterable(rows)),
            np.int64,
            sum(map(len, rows)),
        )
        self._split_new_pieces()
        stops = np.frombuffer(self._piece_stops, np.int64)
        lengths = stops[pieces + 1] - stops[pieces]
        ends = np.concatenate([[0], np.cumsum(lengths)])  # in words, of the pieces
        places = np.arange(ends[-1]) + np.repeat(stops[pieces] - ends[:-1], lengths)
        ids = np.frombuffer(self._piece_words, np.int32)[places]
        document_stops = ends[np.cumsum([len(row) for row in rows], dtype=np.int64)]  # in words
        document_lengths = np.diff(document_stops, prepend=0) + 1
        return np.insert(ids, document_stops, np.int32(0)), document_lengths

    def _split_new_pieces(self) -> None:
        new = self._pieces.new
        if not new:
            return
        words, lengths = self._split([piece.encode("utf-8", "surrogatepass") for piece in new])
        new.clear()
        self._piece_words.extend(map(self._words.__getitem__, words))
        self._words.new.clear()
        stops = self._piece_stops[-1] + np.cumsum(lengths, dtype=np.int64)
        self._piece_stops.frombytes(stops.tobytes())


@functools.lru_cache(maxsize=1)
def word_table(type: str, lowercase: bool) -> WordTable:
    """Returns this process's table for the tokenizer with this config."""
    import_quietly()
    import tensorflow as tf

    from data_pipelines.tokenizer import WordTokenizer

    tokenizer = WordTokenizer(None, lowercase)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def split(pieces: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        words = tokenizer.split(pieces)
        return words.flat_values, words.row_lengths()

    def split_pieces(pieces: list[bytes]) -> tuple[list[bytes], np.ndarray]:
        with tf.device("/CPU:0"):
            words, lengths = split(tf.constant(pieces, tf.string))
        return words.numpy().tolist(), lengths.numpy()

    return WordTable(split_pieces)
