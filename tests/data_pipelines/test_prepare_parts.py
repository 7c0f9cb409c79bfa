from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
import tensorflow as tf
from hypothesis import example, given, settings

from data_pipelines import prepare_parts
from data_pipelines.prepare_parts import BadExamples, word_table
from data_pipelines.tokenizer import WordTokenizer

# What the rules of the tokenizer turn on: separators of all kinds, line breaks, apostrophes, marks,
# letters whose lower case depends on their neighbours, symbols, lone surrogates.
TRICKY = list(
    "aΣσI'’-<>/ \t\n\r\x0b\x0c\x00\x1c\x85\xa0\u0301\u200b\u2028\u3000\ufeff\U0001f600\ud800"
)
ATOMS = st.one_of(
    st.sampled_from([*TRICKY, "<br />", "<BR\n/>", "< / br>", "ΑΣ", "word", "don't"]),
    st.characters(),
)


def words_of(texts: Iterable[str], lowercase: bool) -> list[list[str]]:
    table = word_table("word", lowercase)
    table.begin_part()
    ids, lengths = table.numbers(list(texts))
    words, start, documents = table.words(), 0, []
    for length in lengths.tolist():
        document = ids[start : start + length].tolist()
        assert document[-1] == 0 and 0 not in document[:-1]
        documents.append([words[number].decode() for number in document[:-1]])
        start += length
    assert start == len(ids)
    return documents


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(ATOMS, max_size=12).map("".join), max_size=6), st.booleans())
@example(["ΟΔΟΣ ΟΔΟΣ. ΣΑΣ'Σ", "a<br\x0b/>b", "<br/", "", "İI"], True)
def test_looked_up_words_are_those_of_the_tokenizer(texts: list[str], lowercase: bool) -> None:
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    expected = WordTokenizer(None, lowercase).split(tf.constant(raw, tf.string)).to_list()
    assert words_of(texts, lowercase) == [[w.decode() for w in words] for words in expected]


def test_a_table_that_forgets_gives_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_parts, "MAX_PIECES", 2)
    for texts in (["a b c d"], ["d e"], ["a a e"]):
        assert words_of(texts, True) == [text.split() for text in texts]


def test_bad_examples_are_counted_by_reason_without_values() -> None:
    bad = BadExamples()
    for line in range(30):
        bad.add(f"a.csv, line {line}", f"label 'x{line}' is not one of neg, pos")
    bad.add("b.csv, line 1", "not UTF-8: byte 0xff at character 12")
    bad.merge([("c.csv, line 9", "the text is empty")], {"the text is empty": 40})
    assert len(bad) == 71 and len(bad.first) == 20 and bad.first[0][0] == "a.csv, line 0"
    assert bad.by_count() == [
        ("the text is empty", 40),
        ("label ... is not one of neg, pos", 30),
        ("not UTF-8: byte ... at character ...", 1),
    ]
