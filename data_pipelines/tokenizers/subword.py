"""Pieces of words: "going" may be "go", "##ing".

Splits text into words and symbols as `WordTokenizer` does, and cuts each into the longest pieces
of the vocabulary, from left to right (Wu et al. 2016, "Google's Neural Machine
Translation System", section 4.1, as BERT applies it). A character without a piece is unknown, and
so is a word of more than 100 characters. `subword_vocabulary` learns the pieces.
"""

from collections.abc import Iterable, Sequence

import tensorflow as tf

from data_pipelines.reserved_ids import PADDING_ID, RESERVED
from data_pipelines.tokenizers.subword_vocabulary import (
    CONTINUED,
    MAX_PIECE_CHARACTERS,
    MAX_WORD_CHARACTERS,
)
from data_pipelines.tokenizers.tokenizer import Tokenizer, piece_table
from data_pipelines.tokenizers.vocabulary import FIRST_ID
from data_pipelines.tokenizers.word import WordTokenizer


class SubwordTokenizer(Tokenizer):
    """Splits words into pieces, and numbers them.

    Args:
        pieces: the vocabulary, most frequent first; those that do not begin a word start with "##".
        lowercase: whether text is lower-cased first.

    Raises:
        InputError: a piece is repeated, reserved, empty or holds white space.
    """

    def __init__(self, pieces: Sequence[str], lowercase: bool = True) -> None:
        super().__init__("subword", pieces, lowercase)
        self._words = WordTokenizer([], lowercase)
        self._table = piece_table(pieces)
        lengths = [len(piece.removeprefix(CONTINUED)) for piece in pieces]
        self._longest = min(max(lengths, default=1), MAX_PIECE_CHARACTERS)

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits string [documents] into pieces: ragged string [documents, (pieces)].

        A character without a piece is kept.
        """
        words = self._words.split(texts)
        distinct, places = tf.unique(words.flat_values)
        pieces = tf.gather(self.split_words(distinct), places)  # [words, (pieces)]
        return words.with_values(pieces).merge_dims(1, 2)

    def split_words(self, words: tf.Tensor) -> tf.RaggedTensor:
        """Splits string [words], which `WordTokenizer.split` gave: string [words, (pieces)]."""
        numbers = tf.range(tf.size(words))  # of the words that are not done
        short = tf.strings.length(words, "UTF8_CHAR") <= MAX_WORD_CHARACTERS
        found, of_word = tf.boolean_mask(words, ~short), tf.boolean_mask(numbers, ~short)
        left, numbers = tf.boolean_mask(words, short), tf.boolean_mask(numbers, short)
        begins = tf.constant(True)
        vector = tf.TensorShape([None])
        found, of_word, *_ = tf.while_loop(
            lambda found, of_word, left, numbers, begins: tf.size(left) > 0,
            self._next_pieces,
            (found, of_word, left, numbers, begins),
            shape_invariants=(vector, vector, vector, vector, begins.shape),
        )
        order = tf.argsort(of_word, stable=True)
        return tf.RaggedTensor.from_value_rowids(
            tf.gather(found, order),
            tf.cast(tf.gather(of_word, order), tf.int64),
            nrows=tf.size(words, tf.int64),
        )

    def _next_pieces(
        self,
        found: tf.Tensor,  # string [pieces]
        of_word: tf.Tensor,  # int32 [pieces]
        left: tf.Tensor,  # string [words that are not done]: the rest of each, unmarked
        numbers: tf.Tensor,  # int32 [words that are not done]
        begins: tf.Tensor,  # whether these are the first pieces
    ) -> tuple[tf.Tensor, ...]:
        mark = tf.where(begins, "", CONTINUED)
        lengths = tf.range(self._longest, 0, -1)  # [lengths]
        shape = [tf.size(left), self._longest]
        candidates = mark + tf.strings.substr(
            tf.broadcast_to(left[:, None], shape),
            tf.zeros(shape, tf.int32),
            tf.broadcast_to(lengths, shape),
            "UTF8_CHAR",
        )  # [words, lengths]
        known = self._table.lookup(candidates) >= FIRST_ID
        # If no candidate is known, the shortest: one character.
        best = tf.where(tf.reduce_any(known, 1), tf.argmax(known, 1), self._longest - 1)
        pieces = tf.gather(candidates, best, batch_dims=1)
        bytes_taken = tf.strings.length(pieces) - tf.strings.length(mark)
        left = tf.strings.substr(left, bytes_taken, tf.strings.length(left))
        more = left != ""
        return (
            tf.concat([found, pieces], 0),
            tf.concat([of_word, numbers], 0),
            tf.boolean_mask(left, more),
            tf.boolean_mask(numbers, more),
            tf.constant(False),
        )

    def encode_words(self, words: tf.Tensor) -> tf.RaggedTensor:
        """Returns ids instead of strings: int32 [words, (pieces)]."""
        return self._numbered(self.split_words(words))

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        return self._numbered(self.split(texts))

    def _numbered(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        return pieces.with_flat_values(tf.cast(self._table.lookup(pieces.flat_values), tf.int32))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the words of one document [pieces], joined by spaces, without padding."""
        pieces = (*RESERVED, *self._lines)
        text = " ".join(pieces[i] for i in self._checked(ids) if i != PADDING_ID)
        # No word and no piece but the continued ones has the mark after a space.
        return text.replace(f" {CONTINUED}", "").removeprefix(CONTINUED)
