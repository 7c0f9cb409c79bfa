import gzip
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from data_pipelines.errors import InputError
from data_pipelines.word_vectors import read_word_vectors

WORDS = ["the", "The", "naïve", "8", "new york", "absent"]


def read(path: Path, content: bytes, words: list[str] = WORDS, dim: int = 2) -> dict:
    path.write_bytes(content)
    places, vectors = read_word_vectors(str(path), words, dim)
    assert vectors.dtype == np.float32 and vectors.shape == (len(places), dim)
    return {words[place]: vector.tolist() for place, vector in zip(places, vectors, strict=True)}


@pytest.mark.parametrize("header", [b"", b"5 2\n"])
@pytest.mark.parametrize("end", [b"\n", b" \n", b"\r\n"])
def test_vectors_of_the_words_asked_for(tmp_path: Path, header: bytes, end: bytes) -> None:
    lines = [b"the 1 -2.5", "naïve 3e-2 4".encode(), b"other x y", b"8 5 6", b"new york 7 8"]
    found = read(tmp_path / "v.txt", header + end.join([*lines, b"the 9 9", b""]))
    expected = {"the": [1, -2.5], "naïve": [0.03, 4], "8": [5, 6], "new york": [7, 8]}
    assert list(found) == list(expected)
    for word, vector in expected.items():
        np.testing.assert_allclose(found[word], vector, rtol=1e-6)


def test_a_compressed_file_without_a_last_line_end(tmp_path: Path) -> None:
    assert read(tmp_path / "v.txt.gz", gzip.compress(b"the 1 2\nThe 3 4")) == {
        "the": [1, 2],
        "The": [3, 4],
    }
    with pytest.raises(InputError, match=r"v.txt.gz is cut off after line \d+: fetch"):
        read(tmp_path / "v.txt.gz", gzip.compress(b"the 1 2\n" * 99)[:-9])


def test_words_of_one_number(tmp_path: Path) -> None:
    assert read(tmp_path / "v.txt", b"8 5\nthe 6\n", dim=1) == {"8": [5], "the": [6]}
    assert read(tmp_path / "v.txt", b"8 1\nthe 6\n", dim=1) == {"the": [6]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"5 3\nthe 1 2 3\n", "in its first line that vectors have 3 numbers.*--embedding_dim=3"),
        (b"the 1 2\nof 1\n", "line 2 is not a word and 2 numbers: b'of 1'"),
        (b"the 1 2\n\n", "line 2 is not a word and 2 numbers: b''"),
        (b" 1 2\n", "line 1 is not a word and 2 numbers"),
        (b"of 1 2\nthe 1 two\n", "line 2: b'two' is not a finite number"),
        (b"the 1 nan\n", "line 1: b'nan' is not a finite number"),
        (b"the 1e39 1\n", "line 1: b'1e39' is not a finite number"),
        (b"the 1_0 1\n", "line 1: b'1_0' is not a finite number"),
        (b"the 1  2\n", "line 1: b'' is not a finite number|line 1 is not"),
        (b"of 1 2\n" + b"x" * 10_000, "line 2 has more than 4224 bytes"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    if content == b"the 1  2\n":
        assert read(tmp_path / "v.txt", content, words=["of"]) == {}  # a word with spaces
        return
    with pytest.raises(InputError, match=says):
        read(tmp_path / "v.txt", content)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        read_word_vectors(str(tmp_path / "v.txt"), WORDS, 2)


word = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    words = data.draw(st.lists(word, unique=True, max_size=8))
    dim = data.draw(st.integers(2, 4))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    vectors = data.draw(arrays(np.float32, (len(words), dim), elements=numbers))
    header = data.draw(st.booleans())
    lines = [f"{len(words)} {dim}"] if header else []
    lines += [" ".join([w, *map(repr, v.tolist())]) for w, v in zip(words, vectors, strict=True)]
    asked = [w for w in data.draw(st.permutations([*words, *data.draw(st.lists(word))]))]
    asked = list(dict.fromkeys(asked))
    path = tmp_path_factory.mktemp("vectors") / "v.txt"
    found = read(path, "\n".join(lines).encode(), asked, dim)
    assert list(found) == [w for w in words if w in asked]
    for w, vector in found.items():
        assert vector == vectors[words.index(w)].tolist()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text("th e01.\n-", max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused_by_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("vectors") / "v.txt"
    try:
        found = read(path, content)
    except InputError as error:
        assert ", line " in str(error) or "in its first line" in str(error)
    else:
        assert set(found) <= set(WORDS) and np.isfinite(list(found.values())).all()


@pytest.mark.seconds
def test_memory_is_that_of_the_words_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "v.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for i in range(8_000):
            file.write(f"word{i} ".encode() + b"0.123456 " * 200 + b"\n")
    tracemalloc.start()
    places, _ = read_word_vectors(str(path), ["word7", "word7999"], 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert places.tolist() == [0, 1]
    assert peak < 4e6  # the text is 14 MB
