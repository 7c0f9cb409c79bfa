"""What the tokenizers share: in-graph normalisation, and what follows from the vocabulary."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tensorflow as tf

from data_pipelines.reserved_ids import END_ID, RESERVED, UNKNOWN_ID
from data_pipelines.tokenizers import vocabulary


class VocabularyTokenizer(tf.Module):
    """A tokenizer's common part. Those derived give `split`, `_ids`, `decode` and `config`.

    Args:
        name: of the module.
        lines: of `vocab.txt`, without the reserved ones; None makes a tokenizer that can only
            `split`.

    Raises:
        InputError: a line is repeated, reserved, empty or holds white space.
    """

    def __init__(self, name: str, lines: Sequence[str] | None) -> None:
        super().__init__(name=name)
        if lines is not None:
            vocabulary.check_lines(lines)
        self._lines = None if lines is None else tuple(lines)

    def config(self) -> dict[str, Any]:
        """Returns what `load` needs besides the vocabulary, as JSON values."""
        raise NotImplementedError

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns ragged int32 [documents, (pieces)]."""
        raise NotImplementedError

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Turns documents into ids.

        Args:
            texts: string [documents].

        Returns:
            Ragged int32 [documents, (pieces + 1)]: each document ends with END_ID.

        Raises:
            ValueError: the tokenizer was made without a vocabulary.
        """
        self._vocabulary()
        ids = self._ids(texts)
        ends = tf.fill([ids.nrows(), 1], tf.constant(END_ID, tf.int32))
        return tf.concat([ids, tf.RaggedTensor.from_tensor(ends)], axis=1)

    @property
    def vocab_size(self) -> int:
        """The number of ids, the three reserved ones included."""
        return len(RESERVED) + len(self._vocabulary())

    @property
    def vocab_bytes(self) -> bytes:
        """The contents of `vocab.txt`: one piece a line in UTF-8, the reserved ones first."""
        return vocabulary.lines_bytes(self._vocabulary())

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest over the config and the vocabulary: equal digests give equal ids."""
        return vocabulary.digest(self.config(), self.vocab_bytes)

    def save(self, folder: str | Path) -> Path:
        """Writes `vocab.txt` into an existing folder and returns its path."""
        path = Path(folder) / "vocab.txt"
        path.write_bytes(self.vocab_bytes)
        return path

    def _vocabulary(self) -> tuple[str, ...]:
        if self._lines is None:
            kind = type(self).__name__
            raise ValueError(f"this {kind} was made without a vocabulary: it can only split")
        return self._lines

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """Returns ids as a list.

        Raises:
            ValueError: one is outside the vocabulary, or there is no vocabulary.
        """
        numbers = [int(i) for i in ids]
        bad = next((i for i in numbers if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"id {bad} is outside the vocabulary of {self.vocab_size} pieces")
        return numbers


class CasedTokenizer(VocabularyTokenizer):
    """What the tokenizers share that are told whether to lower-case, and nothing else.

    Attributes:
        KIND: the config's "type".
        read_pieces: from the path of `vocab.txt` to what the class is made of.
    """

    KIND: str
    read_pieces = staticmethod(vocabulary.read_lines)

    def __init__(self, lines: Sequence[str] | None, lowercase: bool) -> None:
        super().__init__(f"{self.KIND}_tokenizer", lines)
        self.lowercase = lowercase

    def config(self) -> dict[str, Any]:
        """Returns what `load` needs besides the vocabulary, as JSON values."""
        return {"type": self.KIND, "lowercase": self.lowercase}

    @classmethod
    def load(cls, vocab_path: str | Path, config: dict[str, Any]) -> Self:
        """Returns the tokenizer that `save` wrote and `config` described.

        Raises:
            InputError: the file is missing or no vocabulary, or the config is another kind's.
        """
        vocabulary.check_config(vocab_path, config, cls.KIND, "lowercase")
        return cls(cls.read_pieces(vocab_path), lowercase=config["lowercase"])


def piece_table(pieces: Sequence[str]) -> tf.lookup.StaticHashTable:
    """Returns a table from strings to int64 ids; what is no piece has UNKNOWN_ID."""
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
    # a dotless i), and this leaves it none of the letters that matter.
    return tf.strings.lower(tf.strings.lower(texts), encoding="utf-8")
