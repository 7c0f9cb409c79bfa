from pathlib import Path

import hypothesis.strategies as st
import pytest
import tensorflow as tf
from hypothesis import example, given, settings

from data_pipelines.reserved_ids import END_ID, PADDING_ID, UNKNOWN_ID
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tokenizers.subword import SubwordTokenizer
from data_pipelines.tokenizers.subword_vocabulary import cut
from data_pipelines.tokenizers.word import WordTokenizer

PIECES = ["go", "##ing", "##o", "##d", "g", "##ood", ".", "#", "é", "##é"]
TEXTS = st.lists(st.text(st.sampled_from("good inéG.#'🎬\0")) | st.text(), max_size=4)
SOME_PIECES = st.lists(
    st.text(st.sampled_from("godiné."), min_size=1, max_size=4), unique=True, max_size=12
)


@settings(max_examples=25, deadline=None)
@given(TEXTS, SOME_PIECES, st.booleans())
@example(["", "g" * 100, "g" * 101 + " go", "go" * 5000], ["go", "g"], True)
def test_pieces_are_those_of_the_definition(
    texts: list[str], pieces: list[str], lowercase: bool
) -> None:
    known = [*pieces, *("##" + piece for piece in reversed(pieces))]
    tokenizer = SubwordTokenizer(known, lowercase)
    strings = tf.constant(texts, tf.string)
    expected = [
        [piece for word in words for piece in cut(word.decode(), set(known))]
        for words in WordTokenizer([], lowercase).split(strings).to_list()
    ]
    found = tokenizer.split(strings).to_list()
    assert [[piece.decode() for piece in pieces] for pieces in found] == expected
    numbers = {piece: number for number, piece in enumerate(known, start=3)}
    encoded = tokenizer.encode(strings)
    assert encoded.dtype == tf.int32
    assert encoded.to_list() == [
        [numbers.get(piece, UNKNOWN_ID) for piece in pieces] + [END_ID] for pieces in expected
    ]


def test_decode_joins_the_pieces_of_a_word() -> None:
    tokenizer = SubwordTokenizer(PIECES)
    (ids,) = tokenizer.encode(tf.constant(["Good xgoing ## #."])).to_list()
    assert ids == [3, 5, 6, 1, 1, 5, 4, 10, 10, 10, 9, 2]
    assert tokenizer.decode([*ids, PADDING_ID]) == "good <unk> <unk>oing # # # . <eos>"
    assert tokenizer.decode([4, 3]) == "ing go"
    with pytest.raises(ValueError, match="id 13"):
        tokenizer.decode([13])


def test_words_are_encoded_as_in_a_text() -> None:
    tokenizer = SubwordTokenizer(PIECES)
    words = tf.constant(["going", "é", "god"])
    assert tokenizer.encode_words(words).to_list() == [[3, 4], [11], [3, 6]]


def test_saved_tokenizer_loads_equal(tmp_path: Path) -> None:
    tokenizer = SubwordTokenizer(PIECES, lowercase=False)
    path = tmp_path / "vocab.txt"
    path.write_bytes(tokenizer.vocab_bytes)
    loaded = load_tokenizer(path, tokenizer.config())
    assert loaded.vocab_bytes == tokenizer.vocab_bytes
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(tf.constant(["going"])).to_list() == [[3, 4, 2]]
