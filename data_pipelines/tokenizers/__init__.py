"""Text -> ids, by one of several rules, all of them in-graph: see `Tokenizer`.

Each kind is a module; importing this package imports neither them nor TensorFlow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_pipelines.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf

TOKENIZERS = ("word", "character", "byte", "subword")


class Tokenizer(Protocol):
    """What every tokenizer is: the one of prepare, train, predict and export.

    Each is a `tf.Module` made of TensorFlow operations, so that a model that holds one exports it
    with it. Ids: 0 padding, 1 unknown, 2 end of sequence, pieces from 3. No input text raises:
    bytes that are not UTF-8 are read as U+FFFD (and by the byte tokenizer, as they are).
    """

    @property
    def vocab_size(self) -> int:
        """The number of ids, the three reserved ones included."""

    @property
    def vocab_bytes(self) -> bytes:
        """The contents of `vocab.txt`: one piece a line in UTF-8, the reserved ones first."""

    @property
    def sha256(self) -> str:
        """Hex digest over the config and the vocabulary: equal digests give equal ids."""

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits string [documents] into pieces: ragged string [documents, (pieces)]."""

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Turns string [documents] into ragged int32 [documents, (pieces + 1)], END_ID last."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of one document's ids, or one like it: see each kind.

        Raises:
            ValueError: an id is outside the vocabulary.
        """

    def config(self) -> dict[str, Any]:
        """Returns what `load_tokenizer` needs besides the vocabulary, as JSON values."""

    def save(self, folder: str | Path) -> Path:
        """Writes `vocab.txt` into an existing folder and returns its path."""


def make_tokenizer(pieces: Sequence[str], config: dict[str, Any]) -> Tokenizer:
    """Returns a new tokenizer.

    Args:
        pieces: its vocabulary without the reserved ones, most frequent first; not used for bytes,
            whose vocabulary is fixed.
        config: as in `load_tokenizer`.

    Raises:
        InputError: a piece is repeated or none of this kind, or the config is of no kind.
    """
    options = {name: value for name, value in config.items() if name != "type"}
    kind = _kind(config)
    return kind() if config["type"] == "byte" else kind(pieces, **options)


def load_tokenizer(vocab_path: str | Path, config: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer that `save` wrote and `config` described.

    Args:
        vocab_path: of `vocab.txt`, in a token store or a model bundle.
        config: what the tokenizer's `config()` gave; its "type" is one of `TOKENIZERS`.

    Raises:
        InputError: the file is missing or no vocabulary of this kind, or the config is of no kind.
    """
    return _kind(config).load(vocab_path, config)


def _kind(config: dict[str, Any]) -> Any:
    """Returns the tokenizer's class; what it is made of differs from kind to kind."""
    match config.get("type"):
        case "word":
            from data_pipelines.tokenizers.word import WordTokenizer

            return WordTokenizer
        case "character":
            from data_pipelines.tokenizers.character import CharacterTokenizer

            return CharacterTokenizer
        case "byte":
            from data_pipelines.tokenizers.byte import ByteTokenizer

            return ByteTokenizer
        case "subword":
            from data_pipelines.tokenizers.subword import SubwordTokenizer

            return SubwordTokenizer
        case other:
            raise InputError(
                f"the tokenizer's type {other!r} is not one of {', '.join(TOKENIZERS)}: its "
                f"config is {config}"
            )
