"""Bytes: each byte of the text is a piece. The vocabulary is fixed."""

from collections.abc import Iterable

import tensorflow as tf

from data_pipelines.reserved_ids import UNKNOWN_ID
from data_pipelines.tokenizers.tokenizer import Tokenizer
from data_pipelines.tokenizers.vocabulary import BYTE_LINES, FIRST_ID


class ByteTokenizer(Tokenizer):
    """Numbers the bytes of a text: byte b is id b + 3. Keeps case, and no byte is unknown."""

    def __init__(self) -> None:
        super().__init__("byte", BYTE_LINES)

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits string [documents] into bytes: ragged string [documents, (bytes)]."""
        return tf.strings.bytes_split(texts)

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        lengths = tf.strings.length(texts)  # in bytes
        # Joined, because `decode_raw` wants texts of equal length.
        values = tf.io.decode_raw(tf.strings.reduce_join(texts), tf.uint8)
        ids = tf.cast(values, tf.int32) + FIRST_ID
        return tf.RaggedTensor.from_row_lengths(ids, tf.cast(lengths, tf.int64))

    def settled(self, text: bytes) -> int:
        """Returns the length: each byte is a token; see `Tokenizer.settled`."""
        return len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of one document [bytes]; U+FFFD stands for unknown ids.

        Leaves out padding and end. Bytes that are not UTF-8 become lone surrogates, so
        decode(encode(text)).encode("utf-8", "surrogateescape") is the text, whatever its bytes.
        """
        return b"".join(map(_bytes_of, self._checked(ids))).decode("utf-8", "surrogateescape")


def _bytes_of(number: int) -> bytes:
    if number == UNKNOWN_ID:
        return "\ufffd".encode()
    return bytes([number - FIRST_ID]) if number >= FIRST_ID else b""
