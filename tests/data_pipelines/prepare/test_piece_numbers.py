from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
import tensorflow as tf
from hypothesis import example, given, settings

from data_pipelines.prepare import piece_numbers as module
from data_pipelines.prepare.piece_numbers import piece_numbers
from data_pipelines.tokenizers import make_tokenizer

# What the rules of the tokenizer turn on: separators of all kinds, line breaks, apostrophes, marks,
# letters whose lower case depends on their neighbours, symbols, lone surrogates.
TRICKY = list(
    "aΣσI'’-<>/ \t\n\r\x0b\x0c\x00\x1c\x85\xa0\u0301\u200b\u2028\u3000\ufeff\U0001f600\ud800"
)
ATOMS = st.one_of(
    st.sampled_from([*TRICKY, "<br />", "<BR\n/>", "< / br>", "ΑΣ", "word", "don't"]),
    st.characters(),
)


def pieces_of(texts: Iterable[str], config: dict) -> list[list[bytes]]:
    table = piece_numbers(config)
    table.begin_part()
    ids, lengths = table.numbers(list(texts))
    start, documents = 0, []
    for length in lengths.tolist():
        document = ids[start : start + length].tolist()
        assert document[-1] == 0 and 0 not in document[:-1]
        documents.append(table.pieces(document[:-1]))
        start += length
    assert start == len(ids)
    return documents


CONFIGS = [
    *({"type": "word", "lowercase": lowercase} for lowercase in (False, True)),
    *({"type": "character", "lowercase": lowercase} for lowercase in (False, True)),
    {"type": "byte"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(ATOMS, max_size=12).map("".join), max_size=6))
@example(["ΟΔΟΣ ΟΔΟΣ. ΣΑΣ'Σ", "a<br\x0b/>b", "<br/", "", "İI"])
def test_counted_pieces_are_those_of_the_tokenizer(config: dict, texts: list[str]) -> None:
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    expected = make_tokenizer([], config).split(tf.constant(raw, tf.string)).to_list()
    assert pieces_of(texts, config) == expected


def test_subwords_are_cut_from_words() -> None:
    config = {"type": "subword", "lowercase": True}
    assert pieces_of(["Going on."], config) == [[b"going", b"on", b"."]]


def test_a_table_that_forgets_gives_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUNS", 2)
    for texts in (["ä b ç d é"], ["d é"], ["ä ä e"]):
        assert pieces_of(texts, CONFIGS[0]) == [text.encode().split() for text in texts]
