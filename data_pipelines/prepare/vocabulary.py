"""Chooses the vocabulary of a store."""

from collections.abc import Callable
from typing import Any

from data_pipelines.errors import InputError
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.drafts import Draft
from data_pipelines.tokenizers.subword_vocabulary import learn_pieces
from data_pipelines.tokenizers.vocabulary import (
    FIRST_ID,
    check_lines,
    digest,
    lines_bytes,
    piece_lines,
    read_pieces,
)

# A model is judged on the other splits: their words must not shape the vocabulary.
SPLITS = ("train", "unsupervised")


def choose_pieces(
    config: PrepareConfig,
    drafts: list[Draft],
    dropped: dict[str, tuple[int, ...]],
    log: Callable[[str], None],
) -> list[str]:
    """Returns the vocabulary without the reserved ids, most frequent first, ties by bytes.

    Raises:
        InputError: the data has fewer words, or subwords, than --vocab_size asks for, or
            --vocab_file cannot be read.
    """
    kind, size = config.tokenizer, config.most_ids - FIRST_ID
    if kind == "byte":
        return []
    if config.vocab_file:
        log(f"prepare: the vocabulary is that of {config.vocab_file}")
        return read_pieces(config.vocab_file, kind)
    total = _count_words(drafts, dropped)
    frequent = [word for word, count in total.items() if count >= config.min_count]
    frequent.sort(key=lambda word: (-total[word], word))
    if kind == "subword":
        log(f"prepare: learning subwords from {len(frequent):,} words")
        counts = {word.decode(): total[word] for word in frequent}
        pieces = learn_pieces(counts, size, config.min_count)
    else:
        pieces = [word.decode() for word in frequent[:size]]
    if len(pieces) < size and kind != "character":
        found = f"{len(pieces)} {kind}s are seen --min_count={config.min_count} times or more"
        if config.vocab_size is not None:
            raise InputError(
                f"--vocab_size={config.vocab_size} is larger than the data: {found}, so it can be "
                f"at most {FIRST_ID + len(pieces)}"
            )
        log(f"prepare: {found}: {FIRST_ID + len(pieces):,} ids instead of {config.most_ids:,}")
    return pieces


def _count_words(drafts: list[Draft], dropped: dict[str, tuple[int, ...]]) -> dict[bytes, int]:
    """Returns the frequency of each word in `SPLITS` without the dropped documents."""
    total: dict[bytes, int] = {}
    for draft in drafts:
        if draft.part.split in SPLITS:
            counts = draft.counts_without(dropped.get(draft.part.name, ())).tolist()
            for word, count in zip(draft.words(), counts, strict=True):
                total[word] = total.get(word, 0) + count
    return total


def vocabulary_facts(tokenizer: dict[str, Any], pieces: list[str]) -> tuple[bytes, dict[str, Any]]:
    """Returns the contents of vocab.txt, and the manifest's facts about it.

    Args:
        tokenizer: config of the tokenizer.
        pieces: the vocabulary without the reserved ids.
    """
    lines = piece_lines(tokenizer["type"], pieces)
    check_lines(lines)
    vocab = lines_bytes(lines)
    return vocab, {
        "tokenizer": tokenizer,
        "vocab_size": FIRST_ID + len(lines),
        "vocab_sha256": digest(tokenizer, vocab),
    }
