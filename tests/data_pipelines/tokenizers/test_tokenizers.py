"""What holds for every kind: the same ids wherever a text is encoded."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import pytest
import tensorflow as tf
from hypothesis import example, given, settings

from data_pipelines.errors import InputError
from data_pipelines.tokenizers import TOKENIZERS, load_tokenizer, make_tokenizer
from data_pipelines.tokenizers.subword_vocabulary import learn_pieces
from data_pipelines.tokenizers.tokenizer import Tokenizer

CHARACTERS = ["a", "e", " ", "\n", "\0", "\\", "é", "\u0301", "🎬", "\ufffd", "\uffff", "Σ", "."]
WORDS = ["a", "the", "film", "don't", "é", "e\u0301", ".", "🎬", "\\", "\ufffd"]
PIECES = learn_pieces({word: 2 for word in [*WORDS, "films", "filming"]}, 40, 1)
VOCABULARIES = {"word": WORDS, "character": CHARACTERS, "byte": [], "subword": PIECES}
TEXTS = st.lists(
    st.text()
    | st.lists(st.sampled_from([*WORDS, *CHARACTERS, "FILMS", "<br />"])).map("".join)
    | st.builds(str.__mul__, st.text(max_size=3), st.integers(0, 3000)),
    min_size=1,
    max_size=4,
).map(lambda texts: [text.encode() for text in texts])


class Server(tf.Module):
    """A model's way in: it holds the tokenizer and takes strings."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def ids(self, texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ids = self.tokenizer.encode(texts)
        return ids.flat_values, ids.row_lengths()


def config_of(kind: str, lowercase: bool) -> dict:
    return {"type": kind} if kind == "byte" else {"type": kind, "lowercase": lowercase}


@lru_cache
def prepared(kind: str, lowercase: bool) -> tuple[Tokenizer, Server, tf.Module]:
    """Returns a tokenizer, a module that holds it, and that module saved and loaded."""
    tokenizer = make_tokenizer(VOCABULARIES[kind], config_of(kind, lowercase))
    server = Server(tokenizer)
    with TemporaryDirectory() as folder:
        tf.saved_model.save(server, folder)
        loaded = tf.saved_model.load(folder)
    return tokenizer, server, loaded


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(texts=TEXTS, lowercase=st.booleans())
@example(texts=[b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80"], lowercase=True)
def test_ids_are_the_same_wherever_a_text_is_encoded(
    kind: str, texts: list[bytes], lowercase: bool
) -> None:
    tokenizer, server, loaded = prepared(kind, lowercase)
    strings = tf.constant(texts, tf.string)
    expected = tokenizer.encode(strings)
    for module in (server, loaded):
        ids, lengths = module.ids(strings)
        found = tf.RaggedTensor.from_row_lengths(ids, lengths)
        assert found.to_list() == expected.to_list()
    pieces = tokenizer.split(strings)
    assert (pieces.row_lengths() + 1).numpy().tolist() == expected.row_lengths().numpy().tolist()


ASCII_TEXTS = st.lists(
    st.sampled_from([*map(chr, range(128)), "<br />", "< BR\t>", "Don't", "film", " "])
).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.text() | ASCII_TEXTS, max_size=4), st.booleans())
@example(["a'b''c'", "<br\x0b>", "a<b<br>r>", "İ", "A\x1cB", ""], True)
@example(["".join(map(chr, range(128)))], False)
def test_rows_outside_of_a_graph_are_the_same(kind: str, texts: list[str], lowercase: bool) -> None:
    tokenizer, *_ = prepared(kind, lowercase)
    expected = tokenizer.encode(tf.constant(texts, tf.string)).to_list()
    assert [list(row) for row in tokenizer.rows(texts)] == expected
    as_bytes = [text.encode() for text in texts]
    assert [list(row) for row in tokenizer.rows(as_bytes)] == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_loaded_tokenizer_is_the_saved_one(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, False)
    tokenizer = make_tokenizer(VOCABULARIES[kind], config)
    (tmp_path / "vocab.txt").write_bytes(tokenizer.vocab_bytes)
    loaded = load_tokenizer(tmp_path / "vocab.txt", config)
    assert loaded.config() == config
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.vocab_bytes == (tmp_path / "vocab.txt").read_bytes()
    assert loaded.vocab_size == len(loaded.vocab_bytes.splitlines())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_empty_batch_gives_no_documents(kind: str) -> None:
    tokenizer = make_tokenizer(VOCABULARIES[kind], config_of(kind, True))
    assert tokenizer.encode(tf.constant([], tf.string)).to_list() == []


@pytest.mark.parametrize("config", [{}, {"type": "letters"}])
def test_unknown_kinds_are_refused(config: dict) -> None:
    with pytest.raises(InputError, match="word, character, byte, subword"):
        load_tokenizer("vocab.txt", config)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("options", [{"lowercase": 1}, {"lowercase": True, "more": True}])
def test_wrong_options_are_refused(kind: str, options: dict, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(make_tokenizer(VOCABULARIES[kind], config_of(kind, True)).vocab_bytes)
    with pytest.raises(InputError, match="config"):
        load_tokenizer(path, {"type": kind, **options})


TOKENS = [
    "film",
    "don't",
    "br",
    "ΑΣ",
    "Σ",
    "İ",
    "ª",
    "ʰ",
    "é",
    "中",
    "。",
    "，",
    "’",
    "😀",
    *"Z9<>/!.:',",
]
SPACES = [" ", "\t", "\n", "\x0b", "\0", "\xad", "\u3000", "\u0301", "\ufeff", "<br />", "< / BR >"]
NO_UTF8 = [b"\xe4", b"\xb8", b"\xff", b"\xf0\x9f", b"\xed\xa0\x80"]
FRAGMENTS = [*(piece.encode() for piece in [*TOKENS, *SPACES]), *NO_UTF8]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(b"".join),
    lowercase=st.booleans(),
    data=st.data(),
)
def test_what_is_settled_can_be_encoded_apart(
    kind: str, text: bytes, lowercase: bool, data: st.DataObject
) -> None:
    tokenizer = prepared(kind, lowercase)[0]
    parts, pending, done = [], b"", 0
    while done < len(text):
        size = data.draw(st.integers(1, 6))
        pending += text[done : done + size]
        done += size
        cut = tokenizer.settled(pending)
        parts.append(pending[:cut])
        pending = pending[cut:]
    found = tokenizer.split(tf.constant([*parts, pending])).flat_values.numpy().tolist()
    assert found == tokenizer.split(tf.constant([text])).flat_values.numpy().tolist()


@pytest.mark.parametrize(
    ("kind", "text", "settled"),
    [
        ("byte", b"caf\xc3", b"caf\xc3"),
        ("character", b"a caf\xc3", b"a "),
        ("word", b"a fine fil", b"a fine "),
        ("word", b"fine.<br /", b"fine."),
        ("word", b"fine, <br /", b"fine, "),
        ("word", b"fine, < 9 ", b"fine, < 9 "),
        ("subword", "好。不".encode(), "好。".encode()),
    ],
)
def test_as_much_is_settled_as_can_be(kind: str, text: bytes, settled: bytes) -> None:
    assert text[: make_tokenizer([], config_of(kind, True)).settled(text)] == settled
