"""Turns documents into numbers of their words, characters or bytes, so that they can be counted.

The pieces are those that the tokenizer's `split` gives (for subwords: the words before they are
cut); the numbers are a table's own. 0 ends a document.
"""

import functools
import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from data_pipelines.quiet_tensorflow import import_quietly

MAX_PIECES = 1 << 21  # that a `WordTable` keeps from part to part; about 500 MB
# The line breaks of `tokenizers/word.py`, where RE2's \s is these five.
_LINE_BREAK = re.compile(r"(?i:<[\t\n\f\r ]*/?[\t\n\f\r ]*br[\t\n\f\r ]*/?[\t\n\f\r ]*>)")


class Table(Protocol):
    """What turns documents into numbers; a process keeps it from part to part."""

    def begin_part(self) -> None:
        """Numbers are the same from this call to the next."""

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 [pieces + documents], each document followed by 0, and their lengths."""

    def words(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the pieces with these numbers, as UTF-8 or bytes of it."""


def piece_table(tokenizer: dict[str, Any]) -> Table:
    """Returns this process's table for the tokenizer with this config."""
    if tokenizer["type"] == "character":
        return _character_table(tokenizer["lowercase"])
    if tokenizer["type"] == "byte":
        return ByteTable()
    return _word_table(tokenizer["lowercase"])


def _with_ends(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 [pieces + documents], value + 1 and 0 after each document, and their lengths.

    Args:
        values: [pieces], from 0.
        lengths: [documents], in pieces.
    """
    numbers = values.astype(np.int32) + 1
    return np.insert(numbers, np.cumsum(lengths, dtype=np.int64), np.int32(0)), lengths + 1


class ByteTable:
    """A `Table` of bytes: byte b is number b + 1."""

    def begin_part(self) -> None:
        """Does nothing: the numbers are fixed."""

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Table` says."""
        raw = [text.encode("utf-8", "surrogatepass") for text in texts]
        lengths = np.array([len(text) for text in raw], np.int64)
        return _with_ends(np.frombuffer(b"".join(raw), np.uint8), lengths)

    def words(self, numbers: Sequence[int]) -> list[bytes]:
        """As `Table` says."""
        return [bytes([number - 1]) for number in numbers]


class CharacterTable:
    """A `Table` of characters: code point c is number c + 1.

    Args:
        code_points: from texts, as UTF-8, to their code points one after the other, and how many
            each has [texts].
    """

    def __init__(self, code_points: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]) -> None:
        self._code_points = code_points

    def begin_part(self) -> None:
        """Does nothing: the numbers are fixed."""

    def numbers(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Table` says."""
        return _with_ends(*self._code_points([t.encode("utf-8", "surrogatepass") for t in texts]))

    def words(self, numbers: Sequence[int]) -> list[bytes]:
        """As `Table` says."""
        return [chr(number - 1).encode() for number in numbers]


@functools.lru_cache(maxsize=1)
def _character_table(lowercase: bool) -> CharacterTable:
    import_quietly()
    import tensorflow as tf

    from data_pipelines.tokenizers.character import CharacterTokenizer

    tokenizer = CharacterTokenizer(None, lowercase)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def decode(texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        code_points = tokenizer.code_points(texts)
        return code_points.flat_values, code_points.row_lengths()

    def code_points(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        with tf.device("/CPU:0"):
            values, lengths = decode(tf.constant(texts, tf.string))
        return values.numpy(), lengths.numpy()

    return CharacterTable(code_points)


class _Numbers(dict[Any, int]):
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

    def words(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the words with these numbers."""
        words = list(self._words)
        return [words[number] for number in numbers]

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
def _word_table(lowercase: bool) -> WordTable:
    import_quietly()
    import tensorflow as tf

    from data_pipelines.tokenizers.word import WordTokenizer

    tokenizer = WordTokenizer(None, lowercase)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def split(pieces: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        words = tokenizer.split(pieces)
        return words.flat_values, words.row_lengths()

    def split_pieces(pieces: list[bytes]) -> tuple[list[bytes], np.ndarray]:
        with tf.device("/CPU:0"):
            words, lengths = split(tf.constant(pieces, tf.string))
        return words.numpy().tolist(), lengths.numpy()

    return WordTable(split_pieces)
