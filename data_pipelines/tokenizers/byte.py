"""Bytes: every byte of the text is a piece, whatever the text is; the vocabulary is fixed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import UNKNOWN_ID
from data_pipelines.tokenizers import vocabulary
from data_pipelines.tokenizers.base import VocabularyTokenizer

BYTES = [bytes([value]) for value in range(256)]


class ByteTokenizer(VocabularyTokenizer):
    """Numbers the bytes of a text: byte b is id b + 3. A `Tokenizer`.

    Nothing is changed first, not even case, and no byte is unknown.
    """

    def __init__(self) -> None:
        super().__init__("byte_tokenizer", [f"0x{value:02X}" for value in range(256)])

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits documents into bytes.

        Args:
            texts: string [documents].

        Returns:
            Ragged string [documents, (bytes)], one byte each; a document may be empty.
        """
        return tf.strings.bytes_split(texts)

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        lengths = tf.strings.length(texts)  # in bytes
        # Joined, because `decode_raw` wants texts of equal length.
        values = tf.io.decode_raw(tf.strings.reduce_join(texts), tf.uint8)
        ids = tf.cast(values, tf.int32) + vocabulary.FIRST_ID
        return tf.RaggedTensor.from_row_lengths(ids, tf.cast(lengths, tf.int64))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of one document [bytes]; U+FFFD stands for unknown ids.

        Padding and end are left out. Bytes that are not UTF-8 become lone surrogates, so
        decode(encode(text)).encode("utf-8", "surrogateescape") is the text, whatever it is.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        pieces = ["\ufffd".encode() if i == UNKNOWN_ID else _byte(i) for i in self._checked(ids)]
        return b"".join(pieces).decode("utf-8", "surrogateescape")

    def config(self) -> dict[str, Any]:
        """Returns what `load` needs besides the vocabulary, as JSON values."""
        return {"type": "byte"}

    @classmethod
    def load(cls, vocab_path: str | Path, config: dict[str, Any]) -> "ByteTokenizer":
        """Returns the tokenizer, after a check that the vocabulary is the one there is.

        Raises:
            InputError: the file is missing or not that vocabulary, or the config is another kind's.
        """
        vocabulary.check_config(vocab_path, config, "byte")
        made = cls()
        if vocabulary.read_lines(vocab_path) != list(made._vocabulary()):
            raise InputError(f"{vocab_path}: not the vocabulary of bytes, 0x00 .. 0xFF")
        return made


def _byte(number: int) -> bytes:
    return BYTES[number - vocabulary.FIRST_ID] if number >= vocabulary.FIRST_ID else b""
