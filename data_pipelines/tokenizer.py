"""In-graph text -> ids: the one tokenizer of prepare, train, predict and export.

The rule, in this order:
1. bytes that are not UTF-8 become U+FFFD (which is then a symbol like any other);
2. HTML line breaks (`<br>`, `<br />`, `</BR>` ...), white space and control characters separate;
3. upper case becomes lower case, if `lowercase`;
4. a word is a run of letters, marks and digits; an apostrophe (' or U+2019) between two of them
   stays in the word ("don't", "o'clock"); every other character is a token of its own.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID, RESERVED, UNKNOWN_ID

_SEPARATOR = r"(?i:<\s*/?\s*br\s*/?\s*>)|[\s\p{Z}\p{C}]+"
_WORD = r"[\p{L}\p{M}\p{N}]"
_TOKEN = rf"{_WORD}+(?:['\x{{2019}}]{_WORD}+)*|[^\s\p{{L}}\p{{M}}\p{{N}}]"


class WordTokenizer(tf.Module):
    """Splits text into words and symbols, and numbers them.

    Ids: 0 padding, 1 unknown word, 2 end of sequence, words from 3 in the order given.
    It is a `tf.Module`, so that a model that holds one exports its table with it.

    Args:
        words: the vocabulary without the reserved tokens, most frequent first; None makes a
            tokenizer that can only `split`.
        lowercase: whether text is lower-cased first.

    Raises:
        InputError: a word is repeated, reserved, empty or holds white space.
    """

    def __init__(self, words: Sequence[str] | None, lowercase: bool = True) -> None:
        super().__init__(name="word_tokenizer")
        self.lowercase = lowercase
        self._tokens = None if words is None else (*RESERVED, *words)
        self._table = None
        if self._tokens is None:
            return
        _check_tokens(self._tokens)
        self._table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant(self._tokens, tf.string),
                tf.range(len(self._tokens), dtype=tf.int64),
            ),
            default_value=UNKNOWN_ID,
        )

    def split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Splits documents into tokens.

        Args:
            texts: string [documents].

        Returns:
            Ragged string [documents, (tokens)], without an end token; a document may be empty.
        """
        texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
        # Before lower-casing, which would cut a text at its first NUL.
        texts = tf.strings.regex_replace(texts, _SEPARATOR, " ")
        if self.lowercase:
            # ASCII first: the Unicode step follows the machine's locale (a Turkish one would
            # turn "I" into a dotless i), and this leaves it none of the letters that matter.
            texts = tf.strings.lower(tf.strings.lower(texts), encoding="utf-8")
        # The whole match (\0) needs no capture group, which RE2 would match far more slowly.
        return tf.strings.split(tf.strings.regex_replace(texts, _TOKEN, r" \0 "))

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Turns documents into ids.

        Args:
            texts: string [documents].

        Returns:
            Ragged int32 [documents, (tokens + 1)]: each document ends with END_ID.

        Raises:
            ValueError: the tokenizer was made without words.
        """
        if self._table is None:
            raise ValueError("this WordTokenizer was made without words: it can only split")
        words = self.split(texts)
        ids = words.with_flat_values(tf.cast(self._table.lookup(words.flat_values), tf.int32))
        ends = tf.fill([ids.nrows(), 1], tf.constant(END_ID, tf.int32))
        return tf.concat([ids, tf.RaggedTensor.from_tensor(ends)], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the tokens of one document [tokens], joined by spaces, without its padding.

        Raises:
            ValueError: an id is outside the vocabulary, or there is no vocabulary.
        """
        tokens = self._vocabulary()
        numbers = [int(i) for i in ids]
        bad = next((i for i in numbers if not 0 <= i < len(tokens)), None)
        if bad is not None:
            raise ValueError(f"id {bad} is outside the vocabulary of {len(tokens)} tokens")
        return " ".join(tokens[i] for i in numbers if i != PADDING_ID)

    @property
    def vocab_size(self) -> int:
        """The number of ids, the three reserved ones included."""
        return len(self._vocabulary())

    @property
    def vocab_bytes(self) -> bytes:
        """The contents of `vocab.txt`: one token a line in UTF-8, the reserved ones first."""
        return "".join(f"{token}\n" for token in self._vocabulary()).encode()

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest over the config and the vocabulary: equal digests give equal ids."""
        config = json.dumps(self.config(), sort_keys=True).encode()
        return hashlib.sha256(config + b"\n" + self.vocab_bytes).hexdigest()

    def config(self) -> dict[str, Any]:
        """Returns what `load` needs besides the vocabulary, as JSON values."""
        return {"type": "word", "lowercase": self.lowercase}

    def save(self, folder: str | Path) -> Path:
        """Writes `vocab.txt` into an existing folder and returns its path."""
        path = Path(folder) / "vocab.txt"
        path.write_bytes(self.vocab_bytes)
        return path

    @classmethod
    def load(cls, vocab_path: str | Path, config: dict[str, Any]) -> "WordTokenizer":
        """Returns the tokenizer that `save` wrote and `config` described.

        Raises:
            InputError: the file is missing or no vocabulary, or the config is another kind's.
        """
        if config.get("type") != "word" or not isinstance(config.get("lowercase"), bool):
            raise InputError(f"{vocab_path}: not a word tokenizer's config: {config}")
        try:
            lines = Path(vocab_path).read_bytes().decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{vocab_path} cannot be read as a vocabulary: {error}") from error
        if tuple(lines[:3]) != RESERVED or lines[-1] != "":
            raise InputError(
                f"{vocab_path}: not a vocabulary: it must start with {', '.join(RESERVED)}, "
                "one a line, and end with a line break"
            )
        return cls(lines[3:-1], lowercase=config["lowercase"])

    def _vocabulary(self) -> tuple[str, ...]:
        if self._tokens is None:
            raise ValueError("this WordTokenizer was made without words: it has no vocabulary")
        return self._tokens


def _check_tokens(tokens: Sequence[str]) -> None:
    """Raises InputError where a vocabulary cannot be written as lines, or numbers a word twice."""
    seen: set[str] = set()
    for line, token in enumerate(tokens, start=1):
        if not token or token.split() != [token]:
            raise InputError(f"vocabulary line {line}: {token!r} is empty or holds white space")
        if token in seen:
            raise InputError(f"vocabulary line {line}: {token!r} is there twice")
        seen.add(token)
