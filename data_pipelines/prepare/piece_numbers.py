"""Turns documents into numbers of their words, characters or bytes, to count them.

The pieces are those of the tokenizer's `split` (for subwords: the words before they are cut).
Number 0 ends a document.
"""

import functools
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from data_pipelines.quiet_tensorflow import import_quietly

MAX_RUNS = 1 << 20  # that `WordNumbers` keeps from part to part; about 300 MB
# The line breaks of `tokenizers/word.py`; RE2's \s is these five characters.
_LINE_BREAK = re.compile(r"(?i:<[\t\n\f\r ]*/?[\t\n\f\r ]*br[\t\n\f\r ]*/?[\t\n\f\r ]*>)")

# Kinds of bytes: ASCII separators, which are white space and controls; letters and digits; the
# apostrophe; symbols; and those of other characters than ASCII.
_SEPARATOR, _WORD, _APOSTROPHE, _SYMBOL, _OTHER = range(5)
_KINDS = np.full(256, _OTHER, np.uint8)
for _byte in range(128):
    _is_separator = _byte <= ord(" ") or _byte == 0x7F
    _is_word = chr(_byte).isalnum()
    _KINDS[_byte] = _SEPARATOR if _is_separator else _WORD if _is_word else _SYMBOL
_KINDS[ord("'")] = _APOSTROPHE


class PieceNumbers(Protocol):
    """Turns documents into numbers; a process keeps it from part to part."""

    def begin_part(self) -> None:
        """Starts a part. Numbers stay the same within a part."""

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 [pieces + documents], each document followed by 0, and their lengths."""

    def pieces(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the pieces with these numbers, as UTF-8 or bytes of it."""


def piece_numbers(tokenizer: dict[str, Any]) -> PieceNumbers:
    """Returns this process's numbering for the tokenizer with this config."""
    if tokenizer["type"] == "byte":
        return FixedNumbers(_bytes_of, lambda value: bytes([value]))
    if tokenizer["type"] == "character":
        return _character_numbers(tokenizer["lowercase"])
    return _word_numbers(tokenizer["lowercase"])


def _encoded(texts: Sequence[str]) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in texts]


class FixedNumbers:
    """Numbers pieces by a fixed rule: bytes, and code points of characters.

    Args:
        values: from texts in UTF-8 to the values of all their pieces, from 0, and the number of
            pieces of each text [texts].
        piece: from a value to its piece.
    """

    def __init__(
        self,
        values: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]],
        piece: Callable[[int], bytes],
    ) -> None:
        self._values, self._piece = values, piece

    def begin_part(self) -> None:
        """Does nothing: the numbers are fixed."""

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `PieceNumbers`: value + 1."""
        values, lengths = self._values(_encoded(texts))
        numbers = values.astype(np.int32) + 1
        return np.insert(numbers, np.cumsum(lengths, dtype=np.int64), np.int32(0)), lengths + 1

    def pieces(self, numbers: Sequence[int]) -> list[bytes]:
        """See `PieceNumbers`."""
        return [self._piece(number - 1) for number in numbers]


def _bytes_of(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(b"".join(texts), np.uint8), np.array([len(t) for t in texts], np.int64)


class WordNumbers:
    """Numbers words.

    The words of ASCII text are found by NumPy, in all documents at once. A run of other text, up to
    the next ASCII separator, is split into words by TensorFlow, once for each distinct run. Arrow
    numbers all words. They are those of `WordTokenizer.split`.

    Args:
        split: from runs in UTF-8 to all their words, and the number of words of each [runs].
        lowercase: whether ASCII letters become lower case.
    """

    def __init__(
        self, split: Callable[[list[bytes]], tuple[list[bytes], np.ndarray]], lowercase: bool
    ) -> None:
        self._split = split
        every = bytes(range(256))
        self._letters = np.frombuffer(every.lower() if lowercase else every, np.uint8)
        self._runs: dict[bytes, list[bytes]] = {}  # the words of each run
        self.begin_part()

    def begin_part(self) -> None:
        """Forgets the numbers, and all runs if there are very many."""
        import pyarrow as pa

        self._pieces = pa.array([], pa.binary())  # the words in the order of their numbers, from 1
        if len(self._runs) > MAX_RUNS:
            self._runs = {}

    def pieces(self, numbers: Sequence[int]) -> list[bytes]:
        """See `PieceNumbers`."""
        return self._pieces.take(np.array(numbers, np.int64) - 1).to_pylist()

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `PieceNumbers`."""
        import pyarrow as pa

        encoded = _encoded([_LINE_BREAK.sub(" ", t) if "<" in t else t for t in texts])
        data = np.frombuffer(b" ".join([*encoded, b""]), np.uint8)
        kinds = _KINDS[data]
        run_starts, runs = _take_runs(data, kinds)
        starts, words = self._words_of_ascii(data, kinds)
        counts, others = self._words_of_runs(runs)
        joined = pa.concat_arrays([self._pieces, words, others]).dictionary_encode()
        numbers = joined.indices.to_numpy()[len(self._pieces) :] + np.int32(1)
        self._pieces = joined.dictionary
        other_starts = np.repeat(run_starts, counts)
        places = np.searchsorted(starts, other_starts)
        numbers = np.insert(numbers[: len(starts)], places, numbers[len(starts) :])
        document_ends = np.cumsum([len(text) + 1 for text in encoded], dtype=np.int64)  # in bytes
        stops = np.searchsorted(starts, document_ends) + np.searchsorted(
            other_starts, document_ends
        )
        return np.insert(numbers, stops, np.int32(0)), np.diff(stops, prepend=0) + 1

    def _words_of_ascii(self, data: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, Any]:
        """Returns where words start, and the words, of what is neither separator nor run.

        Args:
            data: uint8 [bytes].
            kinds: of the bytes; the last is a separator.
        """
        in_word = kinds == _WORD
        apostrophe = kinds == _APOSTROPHE
        in_word[1:-1] |= apostrophe[1:-1] & in_word[:-2] & in_word[2:]
        symbol = (kinds == _SYMBOL) | (apostrophe & ~in_word)
        starts = symbol | in_word
        letters = self._letters[data[starts]]
        starts[1:] &= symbol[1:] | ~in_word[:-1]
        stops = symbol | in_word
        stops[:-1] &= symbol[:-1] | ~in_word[1:]
        first, last = np.flatnonzero(starts), np.flatnonzero(stops)
        return first, _binary(letters, last - first + 1)

    def _words_of_runs(self, runs: Any) -> tuple[np.ndarray, Any]:
        """Returns the number of words of each run [runs], and all words."""
        import pyarrow as pa

        encoded = runs.dictionary_encode()
        distinct = encoded.dictionary.to_pylist()
        if new := [run for run in distinct if run not in self._runs]:
            words, lengths = self._split(new)
            stops = np.cumsum(lengths).tolist()
            for run, start, stop in zip(new, [0, *stops], stops, strict=False):
                self._runs[run] = words[start:stop]
        found = [self._runs[run] for run in distinct]
        lengths = np.array([len(words) for words in found], np.int64)
        indices = encoded.indices.to_numpy()
        counts, first = lengths[indices], (np.cumsum(lengths) - lengths)[indices]
        places = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return counts, pa.array(list(chain.from_iterable(found)), pa.binary()).take(places)


def _take_runs(data: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, Any]:
    """Returns where runs with other bytes than ASCII start, and the runs; `kinds` loses them."""
    separators = np.flatnonzero(kinds == _SEPARATOR)
    ends = np.unique(np.searchsorted(separators, np.flatnonzero(kinds == _OTHER)))
    starts, stops = np.insert(separators + 1, 0, 0)[ends], separators[ends]
    changes = np.zeros(len(data) + 1, np.int8)
    changes[starts], changes[stops] = 1, -1
    inside = np.cumsum(changes[:-1], dtype=np.int8).view(bool)
    kinds[inside] = _SEPARATOR
    return starts, _binary(data[inside], stops - starts)


def _binary(data: np.ndarray, lengths: np.ndarray) -> Any:
    """Returns an Arrow array of byte strings from their bytes, one after the other."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.binary(), len(lengths), buffers)


@functools.lru_cache(maxsize=1)
def _character_numbers(lowercase: bool) -> FixedNumbers:
    import_quietly()
    from data_pipelines.tokenizers.character import CharacterTokenizer

    code_points = compiled(CharacterTokenizer([], lowercase).code_points)
    return FixedNumbers(code_points, lambda code_point: chr(code_point).encode())


@functools.lru_cache(maxsize=1)
def _word_numbers(lowercase: bool) -> WordNumbers:
    import_quietly()
    from data_pipelines.tokenizers.word import WordTokenizer

    split = compiled(WordTokenizer([], lowercase).split)

    def split_runs(runs: list[bytes]) -> tuple[list[bytes], np.ndarray]:
        words, lengths = split(runs)
        return words.tolist(), lengths

    return WordNumbers(split_runs, lowercase)


def compiled(function: Callable[[Any], Any]) -> Callable[[list[bytes]], tuple[Any, Any]]:
    """Compiles a function from string [texts] to a ragged tensor, for the CPU.

    Returns:
        From texts in UTF-8 to the flat values, and the lengths of the rows.
    """
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def run(texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ragged = function(texts)
        return ragged.flat_values, ragged.row_lengths()

    def on_cpu(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        with tf.device("/CPU:0"):
            values, lengths = run(tf.constant(texts, tf.string))
        return values.numpy(), lengths.numpy()

    return on_cpu
