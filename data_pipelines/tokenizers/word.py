"""Words and symbols.

The rule, in this order:
1. bytes that are not UTF-8 become U+FFFD (which is then a symbol like any other);
2. HTML line breaks (`<br>`, `<br />`, `</BR>` ...), white space and control characters separate;
3. upper case becomes lower case, if `lowercase`;
4. a word is a run of letters, marks and digits; an apostrophe (' or U+2019) between two of them
   stays in the word ("don't", "o'clock"); every other character is a token of its own.
"""

from collections.abc import Iterable, Sequence

import tensorflow as tf

from data_pipelines.reserved_ids import PADDING_ID, RESERVED
from data_pipelines.tokenizers.base import CasedTokenizer, lower, piece_table, utf8

_SEPARATOR = r"(?i:<\s*/?\s*br\s*/?\s*>)|[\s\p{Z}\p{C}]+"
_WORD = r"[\p{L}\p{M}\p{N}]"
_TOKEN = rf"{_WORD}+(?:['\x{{2019}}]{_WORD}+)*|[^\s\p{{L}}\p{{M}}\p{{N}}]"


class WordTokenizer(CasedTokenizer):
    """Splits text into words and symbols, and numbers them: a `Tokenizer`.

    Args:
        words: the vocabulary without the reserved tokens, most frequent first; None makes a
            tokenizer that can only `split`.
        lowercase: whether text is lower-cased first.

    Raises:
        InputError: a word is repeated, reserved, empty or holds white space.
    """

    KIND = "word"

    def __init__(self, words: Sequence[str] | None, lowercase: bool = True) -> None:
        super().__init__(words, lowercase)
        self._table = None if words is None else piece_table(words)

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits documents into tokens.

        Args:
            texts: string [documents].

        Returns:
            Ragged string [documents, (tokens)], without an end token; a document may be empty.
        """
        # Separators before lower-casing, which would cut a text at its first NUL.
        texts = tf.strings.regex_replace(utf8(texts), _SEPARATOR, " ")
        if self.lowercase:
            texts = lower(texts)
        # The whole match (\0) needs no capture group, which RE2 would match far more slowly.
        return tf.strings.split(tf.strings.regex_replace(texts, _TOKEN, r" \0 "))

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        assert self._table is not None  # `encode` has seen that there is a vocabulary
        words = self.split(texts)
        return words.with_flat_values(tf.cast(self._table.lookup(words.flat_values), tf.int32))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the tokens of one document [tokens], joined by spaces, without its padding.

        Raises:
            ValueError: an id is outside the vocabulary, or there is no vocabulary.
        """
        tokens = (*RESERVED, *self._vocabulary())
        return " ".join(tokens[i] for i in self._checked(ids) if i != PADDING_ID)
