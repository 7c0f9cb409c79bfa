"""Words and symbols.

The rule, in this order:
1. bytes that are not UTF-8 become U+FFFD (which is then a symbol like any other);
2. HTML line breaks (`<br>`, `<br />`, `</BR>` ...), white space and control characters separate;
3. upper case becomes lower case, if `lowercase`;
4. a word is a run of letters, marks and digits; an apostrophe (' or U+2019) between two of them
   stays in the word ("don't", "o'clock"); every other character is a token.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from data_pipelines.reserved_ids import END_ID, PADDING_ID, RESERVED, UNKNOWN_ID
from data_pipelines.tokenizers.tokenizer import Tokenizer, lower, piece_table, utf8

_SEPARATOR = r"(?i:<\s*/?\s*br\s*/?\s*>)|[\s\p{Z}\p{C}]+"
_WORD = r"[\p{L}\p{M}\p{N}]"
_TOKEN = rf"{_WORD}+(?:['\x{{2019}}]{_WORD}+)*|[^\s\p{{L}}\p{{M}}\p{{N}}]"

# The same rule for ASCII texts.
_ASCII_BREAK = re.compile(r"(?i:<[\t\n\f\r ]*/?[\t\n\f\r ]*br[\t\n\f\r ]*/?[\t\n\f\r ]*>)")
_ASCII_TOKEN = re.compile(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+)*|[!-/:-@\[-`{-~]")


class WordTokenizer(Tokenizer):
    """Splits text into words and symbols, and numbers them.

    Args:
        words: the vocabulary without the reserved tokens, most frequent first.
        lowercase: whether text is lower-cased first.

    Raises:
        InputError: a word is repeated, reserved, empty or holds white space.
    """

    def __init__(self, words: Sequence[str], lowercase: bool = True) -> None:
        super().__init__("word", words, lowercase)
        self._table = piece_table(words)
        self._numbers = {word: number for number, word in enumerate((*RESERVED, *words))}

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits string [documents] into tokens: ragged string [documents, (tokens)]."""
        # Separators before lower-casing, which would cut a text at its first NUL.
        texts = tf.strings.regex_replace(utf8(texts), _SEPARATOR, " ")
        if self.lowercase:
            texts = lower(texts)
        # The whole match (\0) needs no capture group, which RE2 would match far more slowly.
        return tf.strings.split(tf.strings.regex_replace(texts, _TOKEN, r" \0 "))

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        words = self.split(texts)
        return words.with_flat_values(tf.cast(self._table.lookup(words.flat_values), tf.int32))

    def rows(self, texts: Sequence[str | bytes]) -> Sequence[Sequence[int] | np.ndarray]:
        """Returns what `encode` returns; ASCII texts, which most are, spare TensorFlow."""
        others = iter(super().rows([text for text in texts if not text.isascii()]))
        return [self._row_of_ascii(text) if text.isascii() else next(others) for text in texts]

    def _row_of_ascii(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        text = _ASCII_BREAK.sub(" ", text) if "<" in text else text
        text = text.lower() if self.lowercase else text
        number = self._numbers.get
        return [*(number(token, UNKNOWN_ID) for token in _ASCII_TOKEN.findall(text)), END_ID]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the tokens of one document [tokens], joined by spaces, without padding."""
        tokens = (*RESERVED, *self._lines)
        return " ".join(tokens[i] for i in self._checked(ids) if i != PADDING_ID)
