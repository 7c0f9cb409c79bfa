"""Characters: every Unicode code point of the text is a piece, spaces and line breaks too.

The rule, in this order:
1. bytes that are not UTF-8 become U+FFFD (which is then a character like any other);
2. upper case becomes lower case, if `lowercase`.

Nothing is composed or decomposed: an e with a combining accent is two pieces. Dai & Le 2015,
section 4.5, read DBpedia so.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID, UNKNOWN_ID
from data_pipelines.tokenizers import vocabulary
from data_pipelines.tokenizers.base import CasedTokenizer, lower, utf8


class CharacterTokenizer(CasedTokenizer):
    """Splits text into characters, and numbers them: a `Tokenizer`.

    Args:
        characters: the vocabulary, most frequent first; None makes a tokenizer that can only
            `split`.
        lowercase: whether text is lower-cased first.

    Raises:
        InputError: one of `characters` is repeated or not one character.
    """

    KIND = "character"
    read_pieces = staticmethod(vocabulary.read_characters)

    def __init__(self, characters: Sequence[str] | None, lowercase: bool = True) -> None:
        lines = None
        if characters is not None:
            wrong = [c for c in characters if not vocabulary.is_character(c)]
            if wrong:
                raise InputError(f"vocabulary: {wrong[0]!r} is not one character")
            lines = [vocabulary.character_line(c) for c in characters]
        super().__init__(lines, lowercase)
        self._ids_of_code_points = np.full(1, UNKNOWN_ID, np.int32)
        if characters:
            code_points = np.array([ord(c) for c in characters])
            # One more than the largest: the last is for all that are larger.
            ids = np.full(code_points.max() + 2, UNKNOWN_ID, np.int32)
            ids[code_points] = np.arange(len(code_points)) + vocabulary.FIRST_ID
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
        """Splits documents into characters.

        Args:
            texts: string [documents].

        Returns:
            Ragged string [documents, (characters)], each in UTF-8; a document may be empty.
        """
        return tf.strings.unicode_split(self._normalized(texts), "UTF-8")

    def code_points(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """As `split`, in numbers: ragged int32 [documents, (characters)]."""
        return tf.strings.unicode_decode(self._normalized(texts), "UTF-8")

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        code_points = self.code_points(texts)
        ids = tf.constant(self._ids_of_code_points)
        places = tf.minimum(code_points.flat_values, len(self._ids_of_code_points) - 1)
        return code_points.with_flat_values(tf.gather(ids, places))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of one document [characters]; U+FFFD stands for unknown characters.

        Padding and end are left out, so decode(encode(text)) is the text if all its characters are
        in the vocabulary, in lower case if `lowercase`.

        Raises:
            ValueError: an id is outside the vocabulary, or there is no vocabulary.
        """
        characters = ["", "\ufffd", "", *map(vocabulary.line_character, self._vocabulary())]
        assert characters[PADDING_ID] == characters[END_ID] == ""
        return "".join(characters[i] for i in self._checked(ids))
