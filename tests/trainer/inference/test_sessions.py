import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.tokenizers import make_tokenizer
from tests.conftest import SomeReviews
from trainer import native
from trainer.inference import compiled_reader, sessions
from trainer.inference.sessions import ForeignSessionError, Session, SessionReader
from trainer.inference.text_classifier import TextClassifier, load_classifier
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder

without_loops = pytest.mark.skipif(
    not native.library_path().exists(), reason=f"no compiled loops: {native.BUILD}"
)
KINDS = {
    "word": (["film", "a", "the", "good"], {"type": "word", "lowercase": True}),
    "subword": (["fi", "##lm", "t", "##he", "a"], {"type": "subword", "lowercase": True}),
    "character": ([*"abcdefghi "], {"type": "character", "lowercase": False}),
    "byte": ([], {"type": "byte"}),
}


@pytest.fixture(scope="module")
def reviews() -> list[bytes]:
    texts = [e.text.encode() for e in SomeReviews({"test": 20}).examples("test", "all")]
    return ["ΑΣ <br /> naïve 中文。 😀 don’t".encode(), *(text[:700] for text in texts[:5])]


def random_classifier(pooling: str, vocab_size: int, classes: int = 2) -> Classifier:
    """Returns a classifier of two layers whose weights, states included, are all random."""
    encoder = Encoder(vocab_size, 6, 16, seed=1, num_layers=2)
    classifier = Classifier(encoder, classes, pooling=pooling)
    classifier.build()
    random = np.random.default_rng(0)
    for variable in classifier.weights:
        variable.assign(random.normal(0, 0.5, variable.shape))
    return classifier


@pytest.fixture(params=[False, pytest.param(True, marks=without_loops)], ids=["graph", "loops"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reads by the classifier's graph, or by the compiled loops alone."""
    monkeypatch.setattr(native, "_in_inference", request.param)
    with native.using(native.best_instruction_set() if request.param else None):
        yield


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("pooling", "kind", "classes"),
    [
        ("last", "word", 2),
        ("mean", "byte", 3),
        ("concat", "subword", 2),
        ("concat", "character", 3),
    ],
)
def test_pieces_are_read_as_the_whole_is(
    monkeypatch: pytest.MonkeyPatch, reviews: list[bytes], pooling: str, kind: str, classes: int
) -> None:
    monkeypatch.setattr(sessions, "TOKENS_PER_CALL", 50)  # so that some pieces need several calls
    monkeypatch.setattr(compiled_reader, "TABLE_BYTES", 0 if kind == "byte" else 1 << 20)
    tokenizer = make_tokenizer(*KINDS[kind])
    classifier = random_classifier(pooling, tokenizer.vocab_size, classes)
    model = TextClassifier(classifier, tokenizer, [*"abc"][:classes], max_tokens=10_000)
    random = np.random.default_rng(1)
    differences = []
    for text in reviews:
        session, done = model.session(), 0
        while done < len(text):  # cut anywhere, also inside of words and characters
            size = int(random.choice([1, 3, 40, 300]))
            session.feed(text[done : done + size])
            done += size
            saved = session.save()
            session = model.session()
            session.load(saved)
            if random.random() < 0.5:
                whole = model.of_texts(tf.constant([text[:done]]), [-1]).numpy()[0]
                differences.append(np.abs(session.probabilities() - whole).max())
        np.testing.assert_allclose(session.probabilities(), session.probabilities(), atol=1e-6)
    assert len(differences) > 5 and max(differences) < 1e-5


def test_no_token_is_read_twice(classifier_bundle: Path) -> None:
    model = load_classifier(classifier_bundle)
    read = []

    class Counted(SessionReader):
        def _read(self, carried: np.ndarray, *pieces: sessions.Padded) -> list[np.ndarray]:
            read.append([int(lengths[0]) for _, lengths in pieces])
            return super()._read(carried, *pieces)

    session = Session(Counted(model.classifier, model.tokenizer))
    for number in range(5):
        session.feed("a good film, again. ")
        session.probabilities()
        assert session.tokens == 6 * (number + 1)
    assert read == [[6, 1]] * 5  # the piece, and the end token from a copy of the state


def test_many_sessions_are_read_in_one_batch(classifier_bundle: Path) -> None:
    model = load_classifier(classifier_bundle)
    texts = ["A fine film. ", "bad", "", "so long, " * 9]
    many = [model.session() for _ in texts]
    for _ in range(2):
        for session, text in zip(many, texts, strict=True):
            session.feed(text)
        found = model.session_reader.probabilities(many)
    wholes = model.probabilities([2 * text for text in texts])
    np.testing.assert_allclose(found, wholes, atol=1e-6)


def test_past_the_limit_of_a_whole_text_all_tokens_count(
    make_classifier_bundle: Callable[..., Path],
) -> None:
    model = load_classifier(make_classifier_bundle(max_tokens=20))
    session = model.session()
    session.feed("good " * 30)
    longer = TextClassifier(model.classifier, model.tokenizer, model.class_names, max_tokens=31)
    expected = longer.probabilities(["good " * 30])[0]
    np.testing.assert_allclose(session.probabilities(), expected, atol=1e-6)
    assert session.tokens == 30


def test_bytes_without_a_place_to_cut_are_bounded(classifier_bundle: Path) -> None:
    session = load_classifier(classifier_bundle).session()
    session.feed("good ")
    session.feed("x" * (sessions.MAX_PENDING_BYTES - 9))
    before = session.save()
    with pytest.raises(InputError, match=r"16,385 bytes without a space"):
        session.feed("x" * 10)
    assert session.save() == before
    session.feed(" good" * sessions.MAX_PENDING_BYTES)  # long, but it can be cut
    assert session.tokens > 16_000 and len(session.pending) < 10


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"reads_first": True}, "--initial_state=encode"), ({"backward": True}, "two directions")],
)
def test_classifiers_that_need_the_whole_text_are_refused(
    make_classifier_bundle: Callable[..., Path], settings: dict, says: str
) -> None:
    if settings.pop("backward", False):
        settings["backward"] = Classifier(Encoder(1000, 8, 12, seed=4), 2)
    with pytest.raises(InputError, match=says):
        load_classifier(make_classifier_bundle(**settings)).session()


def test_saved_sessions_that_are_foreign_or_damaged_are_refused(
    make_classifier_bundle: Callable[..., Path], classifier_bundle: Path
) -> None:
    model = load_classifier(classifier_bundle)
    session = model.session()
    session.feed("a good fil")
    saved = session.save()
    for place in range(0, len(saved), 7):
        with pytest.raises(InputError, match="damaged") as caught:
            session.load(saved[:place] + bytes([saved[place] ^ 1]) + saved[place + 1 :])
        assert caught.type is InputError
    for wrong in (b"", saved[:-1], saved + b"x", saved[:40]):
        with pytest.raises(InputError, match="damaged"):
            session.load(wrong)
    other = load_classifier(make_classifier_bundle(pooling="mean")).session()
    with pytest.raises(ForeignSessionError, match="belongs to the classifier"):
        other.load(saved)

    def resealed(place: int, data: bytes) -> bytes:
        body = saved[:place] + data + saved[place + len(data) : -sessions.CHECKSUM_BYTES]
        return body + sessions.hashlib.sha256(body).digest()

    with pytest.raises(InputError, match="no saved session"):
        session.load(resealed(0, b"PK"))
    with pytest.raises(ForeignSessionError, match="format version 9"):
        session.load(resealed(8, struct.pack("<I", 9)))
    with pytest.raises(InputError, match="its size is"):
        session.load(resealed(52, struct.pack("<I", 2**31)))
    with pytest.raises(InputError, match="non-finite"):
        session.load(resealed(sessions.HEADER.size, struct.pack("<f", np.nan)))
    assert session.save() == saved
