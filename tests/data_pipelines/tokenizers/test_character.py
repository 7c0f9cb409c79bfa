import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tensorflow as tf
from hypothesis import example, given, settings

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID, UNKNOWN_ID
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tokenizers.character import CharacterTokenizer

CONFIG = {"type": "character", "lowercase": True}


def split(text: str | bytes, lowercase: bool) -> str:
    tokenizer = CharacterTokenizer([], lowercase)
    (characters,) = tokenizer.split(tf.constant([text], tf.string)).to_list()
    (code_points,) = tokenizer.code_points(tf.constant([text], tf.string)).to_list()
    assert [c.decode() for c in characters] == [chr(c) for c in code_points]
    return "".join(map(chr, code_points))


@settings(max_examples=40, deadline=None)
@given(st.text())
@example("a\0b\0")
@example("\ufeff \uffff\U0010ffff<pad>")
@example("\n" * 5000)
def test_decode_gives_the_text_back(text: str) -> None:
    tokenizer = CharacterTokenizer(sorted(set(text)), lowercase=False)
    (ids,) = tokenizer.encode(tf.constant([text], tf.string)).to_list()
    assert len(ids) == len(text) + 1 and ids[-1] == END_ID and UNKNOWN_ID not in ids
    assert tokenizer.decode([*ids, PADDING_ID]) == text


@settings(max_examples=40, deadline=None)
@given(st.text(), st.data())
def test_other_characters_are_unknown(text: str, data: st.DataObject) -> None:
    every = sorted(set(text))
    known = data.draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    (ids,) = CharacterTokenizer(known, False).encode(tf.constant([text], tf.string)).to_list()
    assert ids == [known.index(c) + 3 if c in known else UNKNOWN_ID for c in text] + [END_ID]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("A Film.\n", "a film.\n"),
        ("\0A\0\0B\0", "\0a\0\0b\0"),
        ("ÉTÉ ΣΑΣ E\u0301", "été σας e\u0301"),
        (b"OK \xff\xed\xa0\x80", "ok \ufffd\ufffd\ufffd\ufffd"),
    ],
)
def test_lower_case_changes_nothing_else(text: str | bytes, expected: str) -> None:
    assert split(text, lowercase=True) == expected


@settings(max_examples=40, deadline=None)
@given(st.binary())
def test_bytes_that_are_no_text_are_replaced(raw: bytes) -> None:
    text = split(raw, lowercase=False)
    if "\ufffd" not in text:
        assert text == raw.decode()
    kept = re.sub("\ufffd", "", text)
    assert kept == raw.decode(errors="ignore").replace("\ufffd", "")


def test_decode_shows_the_unknown_and_refuses_foreign_ids() -> None:
    tokenizer = CharacterTokenizer(["a", "\n"])
    assert tokenizer.decode([3, UNKNOWN_ID, 4, END_ID, PADDING_ID]) == "a\ufffd\n"
    with pytest.raises(ValueError, match="id 5"):
        tokenizer.decode([5])


def test_saved_tokenizer_loads_equal(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer([" ", "e", "\n", "\\", "é"])
    path = tmp_path / "vocab.txt"
    path.write_bytes(tokenizer.vocab_bytes)
    assert path.read_text("utf-8") == "<pad>\n<unk>\n<eos>\nU+0020\ne\nU+000A\n\\\né\n"
    loaded = load_tokenizer(path, tokenizer.config())
    assert loaded.vocab_size == tokenizer.vocab_size == 8
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(tf.constant(["É\n x", ""])).to_list() == [[7, 5, 3, 1, 2], [2]]


@pytest.mark.parametrize("characters", [["ab"], [""], ["a", "a"], ["\ud800"]])
def test_bad_characters_are_refused(characters: list[str]) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        CharacterTokenizer(characters)


def test_a_vocabulary_of_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("<pad>\n<unk>\n<eos>\nthe\n")
    with pytest.raises(InputError, match="vocab.txt, line 4: 'the'"):
        load_tokenizer(tmp_path / "vocab.txt", CONFIG)
