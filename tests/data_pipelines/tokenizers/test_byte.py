from pathlib import Path

import hypothesis.strategies as st
import pytest
import tensorflow as tf
from hypothesis import example, given, settings

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID, PADDING_ID, UNKNOWN_ID
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tokenizers.byte import ByteTokenizer


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary() | st.text().map(str.encode), max_size=4))
@example([b"\0", b"", bytes(range(256)), b"\xed\xa0\x80"])
def test_every_byte_has_its_id_and_comes_back(texts: list[bytes]) -> None:
    tokenizer = ByteTokenizer()
    encoded = tokenizer.encode(tf.constant(texts, tf.string))
    assert encoded.dtype == tf.int32
    assert encoded.to_list() == [[*(b + 3 for b in text), END_ID] for text in texts]
    decoded = [tokenizer.decode([*ids, PADDING_ID]) for ids in encoded.to_list()]
    assert [text.encode("utf-8", "surrogateescape") for text in decoded] == texts
    pieces = tokenizer.split(tf.constant(texts, tf.string)).to_list()
    assert pieces == [[bytes([b]) for b in text] for text in texts]


def test_decode_shows_the_unknown_and_refuses_foreign_ids() -> None:
    assert ByteTokenizer().decode([ord("a") + 3, UNKNOWN_ID, END_ID]) == "a\ufffd"
    with pytest.raises(ValueError, match="id 259"):
        ByteTokenizer().decode([259])


def test_vocabulary_is_fixed(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    path = tmp_path / "vocab.txt"
    path.write_bytes(tokenizer.vocab_bytes)
    lines = path.read_text("utf-8").splitlines()
    assert lines[:4] == ["<pad>", "<unk>", "<eos>", "0x00"] and lines[-1] == "0xFF"
    assert len(lines) == tokenizer.vocab_size == 259
    assert load_tokenizer(path, tokenizer.config()).sha256 == tokenizer.sha256
    path.write_text("<pad>\n<unk>\n<eos>\na\n")
    with pytest.raises(InputError, match="vocab.txt: not the vocabulary of bytes"):
        load_tokenizer(path, tokenizer.config())
