"""Tokenizers: text -> ids, by one of several rules. Importing this package spares TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import InputError
from data_pipelines.tokenizers.vocabulary import read_pieces

if TYPE_CHECKING:
    from data_pipelines.tokenizers.tokenizer import Tokenizer

TOKENIZERS = ("word", "character", "byte", "subword")


def make_tokenizer(pieces: Sequence[str], config: dict[str, Any]) -> Tokenizer:
    """Returns a new tokenizer.

    Args:
        pieces: its vocabulary without the reserved ones, most frequent first; unused for bytes,
            whose vocabulary is fixed.
        config: {"type": one of `TOKENIZERS`, "lowercase": bool}, without "lowercase" for bytes.

    Raises:
        InputError: a piece is repeated or not of this kind, or the config is wrong.
    """
    if fault := config_fault(config):
        raise InputError(fault)
    kind = config["type"]
    if kind == "byte":
        from data_pipelines.tokenizers.byte import ByteTokenizer

        return ByteTokenizer()
    if kind == "character":
        from data_pipelines.tokenizers.character import CharacterTokenizer

        return CharacterTokenizer(pieces, config["lowercase"])
    if kind == "subword":
        from data_pipelines.tokenizers.subword import SubwordTokenizer

        return SubwordTokenizer(pieces, config["lowercase"])
    from data_pipelines.tokenizers.word import WordTokenizer

    return WordTokenizer(pieces, config["lowercase"])


def load_tokenizer(vocab_path: str | Path, config: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer whose vocabulary and config were saved.

    Args:
        vocab_path: path of `vocab.txt`, in a token store or a model bundle.
        config: what the tokenizer's `config()` returned.

    Raises:
        InputError: the file is missing or not a vocabulary of this kind, or the config is wrong.
    """
    if fault := config_fault(config):
        raise InputError(f"{vocab_path}: {fault}")
    pieces = read_pieces(vocab_path, config["type"])
    try:
        return make_tokenizer(pieces, config)
    except InputError as error:
        raise InputError(f"{vocab_path}: {error}") from error


def config_fault(config: dict[str, Any]) -> str:
    """Returns why `config` is not a tokenizer's, or ""."""
    options = {"type"} if config.get("type") == "byte" else {"type", "lowercase"}
    known = config.get("type") in TOKENIZERS and config.keys() == options
    if known and isinstance(config.get("lowercase", True), bool):
        return ""
    return f"not a config of a {', '.join(TOKENIZERS)} tokenizer: {config}"
