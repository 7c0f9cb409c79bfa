"""Turns documents into numbers of their words, characters or bytes, to count them.

The pieces are those of the tokenizer's `split` (for subwords: the words before they are cut).
Number 0 ends a document.
"""

import functools
import re
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines.quiet_tensorflow import import_quietly

MAX_CHUNKS = 1 << 21  # that `WordNumbers` keeps from part to part; about 500 MB
# The line breaks of `tokenizers/word.py`; RE2's \s is these five characters.
_LINE_BREAK = re.compile(r"(?i:<[\t\n\f\r ]*/?[\t\n\f\r ]*br[\t\n\f\r ]*/?[\t\n\f\r ]*>)")


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

    A chunk of text between white space is split into words once and then looked up, which is much
    cheaper: few chunks are new. Words never contain white space, so they are those of
    `WordTokenizer.split`.

    Args:
        split: from chunks in UTF-8 to all their words, and the number of words of each [chunks].
    """

    def __init__(self, split: Callable[[list[bytes]], tuple[list[bytes], np.ndarray]]) -> None:
        self._split = split
        self._forget()

    def _forget(self) -> None:
        self._words = {b"": 0}  # no word is empty: 0 ends a document
        self._chunks: dict[bytes, int] = {}
        self._chunk_words = array("i")  # numbers of the words of all chunks
        self._chunk_stops = array("q", [0])  # [1 + chunks]: ends of chunks in `_chunk_words`

    def begin_part(self) -> None:
        """Forgets all words if there are very many."""
        if len(self._chunks) > MAX_CHUNKS:
            self._forget()

    def pieces(self, numbers: Sequence[int]) -> list[bytes]:
        """See `PieceNumbers`."""
        words = list(self._words)
        return [words[number] for number in numbers]

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `PieceNumbers`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        texts = [_LINE_BREAK.sub(" ", text) if "<" in text else text for text in texts]
        rows = pc.ascii_split_whitespace(pa.array(_encoded(texts), pa.binary()).view(pa.string()))
        row_stops = rows.offsets.to_numpy()[1:]  # [documents], in chunks
        encoded = rows.flatten().view(pa.binary()).dictionary_encode()
        distinct = self._numbers_of(encoded.dictionary.to_pylist())
        chunks = distinct[encoded.indices.to_numpy()]
        stops = np.frombuffer(self._chunk_stops, np.int64)
        lengths = stops[chunks + 1] - stops[chunks]  # [chunks], in words
        ends = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(ends[-1]) + np.repeat(stops[chunks] - ends[:-1], lengths)
        numbers = np.frombuffer(self._chunk_words, np.int32)[places]
        document_stops = ends[row_stops]  # in words
        document_lengths = np.diff(document_stops, prepend=0) + 1
        return np.insert(numbers, document_stops, np.int32(0)), document_lengths

    def _numbers_of(self, chunks: list[bytes]) -> np.ndarray:
        """Returns the numbers of distinct chunks: int64 [chunks]."""
        new = [chunk for chunk in chunks if chunk not in self._chunks]
        if new:
            words, lengths = self._split(new)
            for word in words:
                self._words.setdefault(word, len(self._words))
            self._chunk_words.extend(map(self._words.__getitem__, words))
            stops = self._chunk_stops[-1] + np.cumsum(lengths, dtype=np.int64)
            self._chunk_stops.frombytes(stops.tobytes())
            for chunk in new:
                self._chunks[chunk] = len(self._chunks)
        return np.fromiter(map(self._chunks.__getitem__, chunks), np.int64, len(chunks))


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

    def split_chunks(chunks: list[bytes]) -> tuple[list[bytes], np.ndarray]:
        words, lengths = split(chunks)
        return words.tolist(), lengths

    return WordNumbers(split_chunks)


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
