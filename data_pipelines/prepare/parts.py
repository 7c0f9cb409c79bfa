"""What `prepare` does to one part of a source: its text -> a draft -> a shard.

Each step is a function of its arguments alone and leaves its result as files that appear whole or
not at all. So it does not matter which process does it, in which order, or whether twice.

A draft is two files:
  NAME.ids     int32 [tokens]: the documents one after the other, each word as some number; each
               document ends with 0
  NAME.npz     the words, the number of each and how often it was seen, and of each document its
               length in tokens, its label and its id; written last
A draft's words are what `piece_tables` counts: characters or bytes, for those tokenizers.
"""

import dataclasses
import functools
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.prepare.piece_tables import Table, piece_table
from data_pipelines.prepare.windows import windows
from data_pipelines.quiet_tensorflow import import_quietly
from data_pipelines.reserved_ids import END_ID, UNKNOWN_ID
from data_pipelines.sources import BadExample, Example, Source
from data_pipelines.store.store_writer import write_file, write_shard
from data_pipelines.store.token_store import NO_LABEL
from data_pipelines.tokenizers.vocabulary import piece_ids

CHUNK_EXAMPLES = 512
CHUNK_CHARACTERS = 1 << 21  # a document longer than that is a chunk of its own
BLOCK_TOKENS = 1 << 22
REPORTED_EXAMPLES = 20
# Words are UTF-8, or bytes of UTF-8, in which this byte does not occur.
SEPARATOR = b"\xff"
CUT_WORDS = 1 << 15  # that are cut into subwords at a time

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
    writer = _DraftWriter(folder, part, piece_table(tokenizer))

    def blocks() -> Iterator[bytes]:
        good = writer.good(source.examples(part.split, part.part))
        for chunk in windows(good, CHUNK_EXAMPLES, CHUNK_CHARACTERS):
            yield writer.add(chunk).tobytes()
            count(len(chunk))

    write_file(folder / f"{part.name}.ids", blocks())
    writer.finish()


class _DraftWriter:
    """What is known of a part while it is read."""

    def __init__(self, folder: Path, part: Part, table: Table) -> None:
        self._path = folder / f"{part.name}.npz"
        self._bad = BadExamples()
        self._table = table
        table.begin_part()
        self._counts = np.zeros(1, np.int64)  # [words of the table]
        self._lengths, self._labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        self._hashes = [np.zeros(0, np.uint64)]
        self._ids: list[bytes] = []

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
        numbers = np.flatnonzero(self._counts)
        bad = {"first": self._bad.first, "reasons": dict(self._bad.reasons)}
        arrays = {
            "words": joined(self._table.words(numbers.tolist())),
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
    np.savez(buffer, allow_pickle=False, **arrays)
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


def shard_part(
    drafts: Path,
    folder: Path,
    vocab: Path,
    tokenizer: dict[str, Any],
    task: "ShardTask",
    count: Count,
) -> None:
    """Writes a part's shard from its draft, and NAME.json, the manifest's entry for it, last.

    Args:
        drafts: holds the draft.
        folder: for the shard; it exists.
        vocab: vocab.txt.
        tokenizer: its config.
        task: which.
        count: as in `draft_part`.
    """
    draft = Draft(drafts, task.part)
    lengths, labels = draft.array("lengths"), draft.array("labels")
    ids_of, id_lengths = _renumbering(draft, vocab, tokenizer)
    kept = np.delete(np.arange(len(lengths)), task.dropped)
    entry = write_shard(
        folder,
        task.name,
        map(ids_of, _kept_blocks(draft, lengths, task.dropped)),
        id_lengths[kept],
        labels[kept],
        np.dtype(task.dtype),
    )
    write_file(folder / f"{task.name}.json", [json.dumps(entry).encode()])
    count(len(kept))


def _renumbering(
    draft: Draft, vocab: Path, tokenizer: dict[str, Any]
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """Returns what turns the draft's numbers into ids, and the documents' lengths in ids."""
    if tokenizer["type"] == "subword":
        pieces = _PiecesOfWords(draft, vocab, tokenizer)
        return pieces.ids_of, pieces.lengths()
    new_ids = draft.new_ids(_piece_ids(vocab, tokenizer["type"]))
    return new_ids.__getitem__, draft.array("lengths")


class _PiecesOfWords:
    """The ids of each of a draft's words, which are several."""

    def __init__(self, draft: Draft, vocab: Path, tokenizer: dict[str, Any]) -> None:
        self._draft = draft
        numbers, words = draft.array("numbers"), draft.words()
        parts = [
            _cut_words(vocab, tokenizer["lowercase"], words[at : at + CUT_WORDS])
            for at in range(0, len(words), CUT_WORDS)
        ]
        # All ids one after the other, by the numbers of their words, which rise; the end's first.
        self._ids = np.concatenate([np.array([END_ID], np.int32), *(ids for ids, _ in parts)])
        self._counts = np.zeros(int(numbers.max(initial=0)) + 1, np.int64)  # [numbers]
        self._counts[0] = 1
        self._counts[numbers] = np.concatenate([np.zeros(0, np.int64), *(n for _, n in parts)])
        self._starts = np.cumsum(self._counts) - self._counts  # [numbers]

    def ids_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the ids of words that follow each other: int32 [ids]."""
        counts = self._counts[numbers]
        stops = np.cumsum(counts)
        shifts = self._starts[numbers] - (stops - counts)
        return self._ids[np.arange(stops[-1]) + np.repeat(shifts, counts)]

    def lengths(self) -> np.ndarray:
        """Returns how many ids each document has: int64 [documents]."""
        stops = np.cumsum(self._draft.array("lengths"))  # in words
        id_stops = np.zeros_like(stops)
        at = ids_before = 0
        for block in self._draft.token_blocks(0, int(stops[-1]) if len(stops) else 0):
            block_stops = ids_before + np.cumsum(self._counts[block])
            ended = slice(*np.searchsorted(stops, [at + 1, at + len(block) + 1]))
            id_stops[ended] = block_stops[stops[ended] - at - 1]
            at, ids_before = at + len(block), int(block_stops[-1])
        return np.diff(id_stops, prepend=0)


def _cut_words(vocab: Path, lowercase: bool, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 [ids], those of all words, and int64 [words], how many each has."""
    import_quietly()
    import tensorflow as tf

    with tf.device("/CPU:0"):
        ids, counts = _cutter(vocab, lowercase)(tf.constant(words, tf.string))
    return ids.numpy(), counts.numpy()


@functools.lru_cache(maxsize=1)
def _cutter(vocab: Path, lowercase: bool) -> Callable[[Any], tuple[Any, Any]]:
    import tensorflow as tf

    from data_pipelines.tokenizers.subword import SubwordTokenizer

    tokenizer = SubwordTokenizer.load(vocab, {"type": "subword", "lowercase": lowercase})

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def cut(words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ids = tokenizer.encode_words(words)
        return ids.flat_values, ids.row_lengths()

    return cut


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
    folder: Path, tokenizer: dict[str, Any], pieces: list[str], count: Count
) -> None:
    """Writes vocab.txt, and vocabulary.json: what a store's manifest says of it.

    Args:
        folder: where.
        tokenizer: its config.
        pieces: without the reserved ones, in order.
        count: not called.
    """
    import_quietly()
    from data_pipelines.tokenizers import make_tokenizer

    made = make_tokenizer(pieces, tokenizer)
    facts = {
        "tokenizer": made.config(),
        "vocab_size": made.vocab_size,
        "vocab_sha256": made.sha256,
    }
    write_file(folder / "vocab.txt", [made.vocab_bytes])
    write_file(folder / "vocabulary.json", [json.dumps(facts).encode()])


@functools.lru_cache(maxsize=1)
def _piece_ids(vocab: Path, kind: str) -> dict[bytes, int]:
    return piece_ids(vocab, kind)


def id_hashes(ids: list[str]) -> np.ndarray:
    """Returns a 64-bit hash of each id: uint64 [documents]."""
    digests = [
        hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids
    ]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
