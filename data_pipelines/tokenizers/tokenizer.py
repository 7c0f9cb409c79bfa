"""The base class of the tokenizers, and the TensorFlow operations that they share."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from data_pipelines.reserved_ids import END_ID, RESERVED, UNKNOWN_ID
from data_pipelines.tokenizers.vocabulary import check_lines, digest, lines_bytes

# A text may be cut after white space, and after symbols that change no letter's lower case. A full
# stop may: a sigma before "." and a letter is not final.
_LAST_BREAK = re.compile(
    rb".*(?:[ \t\n\f\r,;!?()\"/]|\xe3\x80[\x80-\x82]|\xef\xbc[\x81\x8c\x9f])", re.DOTALL
)
# The start of an HTML line break, which later text may complete.
_OPEN_TAG = re.compile(rb"(?i)<\s*(?:/\s*)?(?:b(?:r\s*(?:/\s*)?)?)?")


class Tokenizer(tf.Module):
    """Turns text into ids. Prepare, training, prediction and export use the same.

    It consists of TensorFlow operations, so an exported model contains it. Ids: 0 padding,
    1 unknown, 2 end of sequence, pieces from 3. No text raises: bytes that are not UTF-8 are read
    as U+FFFD (the byte tokenizer keeps them).

    Args:
        kind: the config's "type".
        lines: of `vocab.txt`, without the reserved ones.
        lowercase: whether text is lower-cased first; None for a kind without this option.

    Raises:
        InputError: a line is repeated, reserved, empty or holds white space.
    """

    def __init__(self, kind: str, lines: Sequence[str], lowercase: bool | None = None) -> None:
        super().__init__(name=f"{kind}_tokenizer")
        check_lines(lines)
        self._kind = kind
        self._lines = tuple(lines)
        self.lowercase = lowercase

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits string [documents] into pieces: ragged string [documents, (pieces)]."""
        raise NotImplementedError

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns ragged int32 [documents, (pieces)]."""
        raise NotImplementedError

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Turns string [documents] into ragged int32 [documents, (pieces + 1)], END_ID last."""
        ids = self._ids(texts)
        ends = tf.fill([ids.nrows(), 1], tf.constant(END_ID, tf.int32))
        return tf.concat([ids, tf.RaggedTensor.from_tensor(ends)], axis=1)

    def rows(self, texts: Sequence[str | bytes]) -> Sequence[Sequence[int] | np.ndarray]:
        """Returns what `encode` returns, a row for each text, outside of any graph.

        Args:
            texts: Bytes need not be UTF-8.
        """
        if not texts:
            return []
        ids = self._encode(tf.constant(list(texts), tf.string))
        return np.split(ids.flat_values.numpy(), ids.row_splits.numpy()[1:-1])

    @functools.cached_property
    def _encode(self) -> tf.types.experimental.PolymorphicFunction:
        return tf.function(
            self.encode, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False
        )

    def settled(self, text: bytes) -> int:
        """Returns how many leading bytes of a text can be encoded now, whatever text follows.

        Their ids and the ids of all later bytes, encoded apart, are those of the whole.
        """
        if not (found := _LAST_BREAK.match(text)):
            return 0
        tag = max(text.rfind(b"<", 0, found.end()), 0)
        return tag if _OPEN_TAG.fullmatch(text, tag, found.end()) else found.end()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of one document's ids, or a similar one: see each kind.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """The number of ids, including the three reserved ones."""
        return len(RESERVED) + len(self._lines)

    @property
    def vocab_bytes(self) -> bytes:
        """The contents of `vocab.txt`: one piece a line in UTF-8, the reserved ones first."""
        return lines_bytes(self._lines)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest over the config and the vocabulary: equal digests give equal ids."""
        return digest(self.config(), self.vocab_bytes)

    def config(self) -> dict[str, Any]:
        """Returns what `load_tokenizer` needs besides the vocabulary, as JSON values."""
        options = {} if self.lowercase is None else {"lowercase": self.lowercase}
        return {"type": self._kind, **options}

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """Returns ids as a list; raises ValueError if one is outside the vocabulary."""
        numbers = [int(i) for i in ids]
        bad = next((i for i in numbers if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"id {bad} is outside the vocabulary of {self.vocab_size} pieces")
        return numbers


def piece_table(pieces: Sequence[str]) -> tf.lookup.StaticHashTable:
    """Returns a table from strings to int64 ids; other strings map to UNKNOWN_ID."""
    keys = tf.constant([*RESERVED, *pieces], tf.string)
    values = tf.range(len(RESERVED) + len(pieces), dtype=tf.int64)
    initializer = tf.lookup.KeyValueTensorInitializer(keys, values)
    return tf.lookup.StaticHashTable(initializer, default_value=UNKNOWN_ID)


def utf8(texts: tf.Tensor) -> tf.Tensor:
    """Returns texts with U+FFFD in place of bytes that are not UTF-8: string [documents]."""
    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")


def lower(texts: tf.Tensor) -> tf.Tensor:
    """Returns texts, which are UTF-8 without NUL, in lower case: string [documents]."""
    # ASCII first: the Unicode step follows the machine's locale (a Turkish one would turn "I" into
    # a dotless i).
    return tf.strings.lower(tf.strings.lower(texts), encoding="utf-8")
