import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tensorflow as tf
from hypothesis import given, settings

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID, UNKNOWN_ID
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tokenizers.word import WordTokenizer


def split(text: str | bytes, lowercase: bool = True) -> list[str]:
    (words,) = WordTokenizer([], lowercase).split(tf.constant([text])).to_list()
    return [word.decode() for word in words]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n\u00a0\u2028\ufeff ", []),
        ("A film.", ["a", "film", "."]),
        ("Great!!", ["great", "!", "!"]),
        ("one<br /><BR>two</br>three< br/ >four", ["one", "two", "three", "four"]),
        ("<b>x</b>", ["<", "b", ">", "x", "<", "/", "b", ">"]),
        ("don't O’Clock rock'n'roll", ["don't", "o’clock", "rock'n'roll"]),
        ("'tis the dogs' 'quote'", ["'", "tis", "the", "dogs", "'", "'", "quote", "'"]),
        ("9/10 a_b 3.5", ["9", "/", "10", "a", "_", "b", "3", ".", "5"]),
        ("ÉTÉ Straße ΣΑΣ", ["été", "straße", "σας"]),
        ("e\u0301a", ["e\u0301a"]),
        ("x\x00Y z", ["x", "y", "z"]),
        ("日本 🎬🎬", ["日本", "🎬", "🎬"]),
        (b"ok \xff\xfe ok", ["ok", "\ufffd", "\ufffd", "ok"]),
    ],
)
def test_split(text: str | bytes, words: list[str]) -> None:
    assert split(text) == words


def test_split_keeps_case_when_told_to() -> None:
    assert split("A Film", lowercase=False) == ["A", "Film"]


@pytest.mark.slow("starts TensorFlow anew, for the environment that it reads then")
def test_lower_case_does_not_follow_the_machines_locale() -> None:
    program = (
        "import tensorflow as tf; from data_pipelines.tokenizers.word import WordTokenizer;"
        "print(WordTokenizer([]).split(tf.constant(['TITLE I'])).to_list())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "[[b'title', b'i']]"


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_split_loses_only_separators(text: str) -> None:
    kept = re.sub(r"(?i:<\s*/?\s*br\s*/?\s*>)", "", text)
    separators = ("Zs", "Zl", "Zp", "Cc", "Cf", "Co")
    kept = "".join(c for c in kept if unicodedata.category(c) not in separators)
    words = split(text, lowercase=False)
    assert "".join(words) == kept
    assert all(word.split() == [word] for word in words)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary() | st.text().map(str.encode), min_size=1, max_size=4))
def test_encode_is_the_words_numbers_for_any_bytes(texts: list[bytes]) -> None:
    documents = WordTokenizer([]).split(tf.constant(texts, tf.string)).to_list()
    distinct = sorted({word for words in documents for word in words})
    known = [word.decode() for word in distinct[::2]]
    numbers = {word.encode(): number for number, word in enumerate(known, start=3)}
    encoded = WordTokenizer(known).encode(tf.constant(texts, tf.string))
    assert encoded.dtype == tf.int32
    assert encoded.to_list() == [
        [numbers.get(word, UNKNOWN_ID) for word in words] + [END_ID] for words in documents
    ]


def test_decode_drops_padding_and_refuses_foreign_ids() -> None:
    tokenizer = WordTokenizer(["good", "film"])
    assert tokenizer.decode([3, 4, UNKNOWN_ID, END_ID, PADDING_ID]) == "good film <unk> <eos>"
    with pytest.raises(ValueError, match="id 5"):
        tokenizer.decode([5])


def test_saved_tokenizer_loads_equal(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(["Film", "é", "."], lowercase=False)
    path = tmp_path / "vocab.txt"
    path.write_bytes(tokenizer.vocab_bytes)
    loaded = load_tokenizer(path, tokenizer.config())
    texts = tf.constant(["Film . film é", ""])
    assert path.read_text(encoding="utf-8") == "<pad>\n<unk>\n<eos>\nFilm\né\n.\n"
    assert loaded.vocab_size == tokenizer.vocab_size == 6
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(texts).to_list() == [[3, 5, 1, 4, 2], [2]]


def test_sha256_depends_on_words_order_and_config() -> None:
    variants = [
        WordTokenizer(["a", "b"]),
        WordTokenizer(["b", "a"]),
        WordTokenizer(["a"]),
        WordTokenizer(["a", "b"], lowercase=False),
    ]
    assert len({t.sha256 for t in variants}) == 4


@pytest.mark.parametrize("words", [["a", "a"], ["<unk>"], [""], ["a b"], ["a\n"]])
def test_bad_words_are_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="vocabulary line"):
        WordTokenizer(words)


@pytest.mark.parametrize("content", [b"", b"a\nb\n", b"<pad>\n<unk>\n<eos>\nno end", b"\xff\n"])
def test_bad_vocabulary_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_tokenizer(path, {"type": "word", "lowercase": True})


def test_missing_vocabulary_and_foreign_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab.txt"):
        load_tokenizer(tmp_path / "vocab.txt", {"type": "word", "lowercase": True})
    with pytest.raises(InputError, match="config"):
        load_tokenizer(tmp_path / "vocab.txt", {"type": "bytes"})


def test_digest_is_what_stores_and_bundles_hold() -> None:
    digest = "bf273ff11405f45165c00ef83bec549385c794d2fe9506f76a96ba9ded07f45f"
    assert WordTokenizer(["good", "film", "\\", "."]).sha256 == digest
