"""Characters: each Unicode code point of the text is a piece, including spaces and line breaks.

The rule, in this order:
1. bytes that are not UTF-8 become U+FFFD (which is then a character like any other);
2. upper case becomes lower case, if `lowercase`.

An e with a combining accent is two pieces: nothing is composed or decomposed. Dai & Le 2015,
section 4.5, read DBpedia by characters.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID, UNKNOWN_ID
from data_pipelines.tokenizers.tokenizer import Tokenizer, lower, utf8
from data_pipelines.tokenizers.vocabulary import FIRST_ID, is_character, line_character, piece_lines

# A character at the end of a text of which bytes are missing.
_INCOMPLETE = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")


class CharacterTokenizer(Tokenizer):
    """Splits text into characters, and numbers them.

    Args:
        characters: the vocabulary, most frequent first.
        lowercase: whether text is lower-cased first.

    Raises:
        InputError: one of `characters` is repeated or not one character.
    """

    def __init__(self, characters: Sequence[str], lowercase: bool = True) -> None:
        if wrong := [c for c in characters if not is_character(c)]:
            raise InputError(f"vocabulary: {wrong[0]!r} is not one character")
        super().__init__("character", piece_lines("character", characters), lowercase)
        code_points = np.array([ord(c) for c in characters], np.int64)
        # One more than the largest: the last is for all larger ones.
        ids = np.full(code_points.max(initial=-1) + 2, UNKNOWN_ID, np.int32)
        ids[code_points] = np.arange(len(code_points)) + FIRST_ID
        self._ids_of_code_points = ids

    def _normalized(self, texts: tf.Tensor) -> tf.Tensor:
        texts = utf8(texts)
        if not self.lowercase:
            return texts
        # Between the NULs, because lower-casing would cut a text at its first one.
        # A constant of one NUL would be empty in a graph, so it is made there.
        nul = tf.strings.unicode_encode(tf.constant([0]), "UTF-8")
        pieces = tf.strings.split(nul + texts, nul)
        pieces = pieces.with_flat_values(nul + lower(pieces.flat_values))
        joined = tf.strings.reduce_join(pieces, axis=-1)  # two NULs before the text
        lengths = tf.strings.length(joined)
        return tf.strings.substr(joined, 2 * tf.ones_like(lengths), lengths)

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits string [documents] into characters: ragged string [documents, (characters)]."""
        return tf.strings.unicode_split(self._normalized(texts), "UTF-8")

    def code_points(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns code points instead of strings: ragged int32 [documents, (characters)]."""
        return tf.strings.unicode_decode(self._normalized(texts), "UTF-8")

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        code_points = self.code_points(texts)
        ids = tf.constant(self._ids_of_code_points)
        places = tf.minimum(code_points.flat_values, len(self._ids_of_code_points) - 1)
        return code_points.with_flat_values(tf.gather(ids, places))

    def settled(self, text: bytes) -> int:
        """Returns how many leading bytes are whole characters; see `Tokenizer.settled`."""
        if self.lowercase:  # which depends on the letters around
            return super().settled(text)
        found = _INCOMPLETE.search(text)
        return found.start() if found else len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of one document [characters]; U+FFFD stands for unknown characters.

        Leaves out padding and end, so decode(encode(text)) is the text (in lower case if
        `lowercase`) if the vocabulary has all its characters.
        """
        characters = ["", "\ufffd", "", *map(line_character, self._lines)]
        assert characters[PADDING_ID] == characters[END_ID] == ""
        return "".join(characters[i] for i in self._checked(ids))
