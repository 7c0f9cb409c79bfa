"""Turns a part's draft into a shard: the draft's numbers become the vocabulary's ids.

A shard depends on its arguments alone, like a draft.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.durable import write_file
from data_pipelines.prepare.drafts import Count, Draft, Part
from data_pipelines.prepare.piece_numbers import compiled
from data_pipelines.quiet_tensorflow import import_quietly
from data_pipelines.reserved_ids import END_ID
from data_pipelines.store.manifest import NO_CONTEXT
from data_pipelines.store.store_writer import write_shard
from data_pipelines.tokenizers.vocabulary import piece_ids, read_pieces

CONTEXTS_FILE = "contexts.json"
CUT_WORDS = 1 << 15  # words that are cut into subwords at a time


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A part's shard.

    Attributes:
        part: the part.
        name: name of the shard.
        dropped: documents of the part that are left out.
        dtype: type of the ids.
    """

    part: Part
    name: str
    dropped: tuple[int, ...]
    dtype: str


def shard_tasks(
    drafts: list[Draft], dropped: dict[str, tuple[int, ...]], dtype: str
) -> list[ShardTask]:
    """Returns a task for each part that has documents."""
    kept: dict[str, list[tuple[Part, tuple[int, ...]]]] = {}
    for draft in drafts:
        left_out = dropped.get(draft.part.name, ())
        if draft.num_examples > len(left_out):
            kept.setdefault(draft.part.split, []).append((draft.part, left_out))
    return [
        ShardTask(part, f"{split}-{number:05d}-of-{len(parts):05d}", left_out, dtype)
        for split, parts in kept.items()
        for number, (part, left_out) in enumerate(parts)
    ]


def shard_part(
    drafts: Path,
    folder: Path,
    tokenizer: dict[str, Any],
    task: ShardTask,
    count: Count,
) -> None:
    """Writes a part's shard from its draft, and last NAME.json, the manifest's entry for it.

    Args:
        drafts: folder of the draft.
        folder: an existing folder for the shard, with vocab.txt, and CONTEXTS_FILE if documents
            have contexts.
        tokenizer: its config.
        task: the shard.
        count: as in `draft_part`.
    """
    draft = Draft(drafts, task.part)
    lengths, labels = draft.array("lengths"), draft.array("labels")
    ids_of, id_lengths = _renumbering(draft, folder / "vocab.txt", tokenizer)
    kept = np.delete(np.arange(len(lengths)), task.dropped)
    numbers = _context_numbers(folder / CONTEXTS_FILE)
    contexts = None
    if numbers is not None:
        found = [numbers.get(name, NO_CONTEXT) for name in draft.contexts()]
        contexts = np.array(found, np.int32)[kept]
    entry = write_shard(
        folder,
        task.name,
        map(ids_of, _kept_blocks(draft, lengths, task.dropped)),
        id_lengths[kept],
        labels[kept],
        np.dtype(task.dtype),
        contexts,
    )
    write_file(folder / f"{task.name}.json", [json.dumps(entry).encode()])
    count(len(kept))


def _renumbering(
    draft: Draft, vocab: Path, tokenizer: dict[str, Any]
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """Returns a function from the draft's numbers to ids, and the documents' lengths in ids."""
    if tokenizer["type"] == "subword":
        pieces = _PiecesOfWords(draft, vocab, tokenizer)
        return pieces.ids_of, pieces.lengths()
    new_ids = draft.new_ids(_piece_ids(vocab, tokenizer["type"]))
    return new_ids.__getitem__, draft.array("lengths")


class _PiecesOfWords:
    """The ids of a draft's words when a word has several."""

    def __init__(self, draft: Draft, vocab: Path, tokenizer: dict[str, Any]) -> None:
        self._draft = draft
        numbers, words = draft.array("numbers"), draft.words()
        parts = [
            _cutter(vocab, tokenizer["lowercase"])(words[at : at + CUT_WORDS])
            for at in range(0, len(words), CUT_WORDS)
        ]
        # The ids of all words in the order of their numbers, after the end's.
        self._ids = np.concatenate([np.array([END_ID], np.int32), *(ids for ids, _ in parts)])
        self._counts = np.zeros(int(numbers.max(initial=0)) + 1, np.int64)  # [numbers]
        self._counts[0] = 1
        self._counts[numbers] = np.concatenate([np.zeros(0, np.int64), *(n for _, n in parts)])
        self._starts = np.cumsum(self._counts) - self._counts  # [numbers]

    def ids_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the ids of consecutive words: int32 [ids]."""
        counts = self._counts[numbers]
        stops = np.cumsum(counts)
        shifts = self._starts[numbers] - (stops - counts)
        return self._ids[np.arange(stops[-1]) + np.repeat(shifts, counts)]

    def lengths(self) -> np.ndarray:
        """Returns the number of ids of each document: int64 [documents]."""
        stops = np.cumsum(self._draft.array("lengths"))  # in words
        id_stops = np.zeros_like(stops)
        at = ids_before = 0
        for block in self._draft.token_blocks(0, int(stops[-1]) if len(stops) else 0):
            block_stops = ids_before + np.cumsum(self._counts[block])
            ended = slice(*np.searchsorted(stops, [at + 1, at + len(block) + 1]))
            id_stops[ended] = block_stops[stops[ended] - at - 1]
            at, ids_before = at + len(block), int(block_stops[-1])
        return np.diff(id_stops, prepend=0)


@functools.lru_cache(maxsize=1)
def _cutter(vocab: Path, lowercase: bool) -> Callable[[list[bytes]], tuple[Any, Any]]:
    """Returns a function from words to all their ids, and the number of ids of each word."""
    import_quietly()
    from data_pipelines.tokenizers.subword import SubwordTokenizer

    pieces = read_pieces(vocab, "subword")
    return compiled(SubwordTokenizer(pieces, lowercase).encode_words)


def _kept_blocks(
    draft: Draft, lengths: np.ndarray, dropped: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Yields the part's tokens, as the draft's numbers, without the dropped documents."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    first = 0
    for number in (*dropped, len(lengths)):
        yield from draft.token_blocks(offsets[first], offsets[number])
        first = number + 1


@functools.lru_cache(maxsize=1)
def _context_numbers(path: Path) -> dict[str, int] | None:
    """Returns the number of each context; None if documents have none."""
    if not path.exists():
        return None
    return {name: number for number, name in enumerate(json.loads(path.read_bytes()))}


@functools.lru_cache(maxsize=1)
def _piece_ids(vocab: Path, kind: str) -> dict[bytes, int]:
    return piece_ids(vocab, kind)
