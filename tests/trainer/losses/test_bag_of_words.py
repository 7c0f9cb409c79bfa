import numpy as np
import pytest
import tensorflow as tf

from trainer.losses.bag_of_words import reconstruction_error, tfidf_shares

VOCAB_SIZE, DIM = 12, 3
TOKENS = np.array([[5, 7, 5, 5, 9, 2], [4, 4, 2, 0, 0, 0], [2, 0, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([6, 3, 1])
MASK = np.arange(6) < LENGTHS[:, None]
IDF = np.random.default_rng(0).uniform(0.5, 3.0, VOCAB_SIZE)
IDF[:3] = 0  # reserved ids are no words


def vectors() -> np.ndarray:
    """The TF-IDF vectors of TOKENS, word by word: [batch, vocab_size]."""
    found = np.zeros((len(TOKENS), VOCAB_SIZE))
    for row, (tokens, length) in enumerate(zip(TOKENS, LENGTHS, strict=True)):
        for word, count in zip(*np.unique(tokens[:length], return_counts=True), strict=True):
            found[row, word] = (1 + np.log(count)) * IDF[word]
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)


def shares(tokens: np.ndarray = TOKENS) -> np.ndarray:
    return tfidf_shares(tf.constant(tokens), tf.constant(MASK), tf.constant(IDF)).numpy()


def test_shares_add_up_to_the_tfidf_vector() -> None:
    found = np.zeros((len(TOKENS), VOCAB_SIZE))
    np.add.at(found, (np.arange(len(TOKENS))[:, None], TOKENS), shares())
    np.testing.assert_allclose(found, vectors(), atol=1e-12)


def test_padding_has_no_share_and_changes_none() -> None:
    padded = np.where(MASK, TOKENS, 5).astype(np.int32)
    np.testing.assert_array_equal(shares(padded), shares())
    assert (shares()[~MASK] == 0).all()


def test_the_error_is_the_squared_distance_from_the_vector() -> None:
    random = np.random.default_rng(1)
    codes = random.normal(size=(len(TOKENS), DIM))
    embeddings = random.normal(size=(VOCAB_SIZE, DIM))
    bias = random.normal(size=VOCAB_SIZE)
    arrays = (codes, embeddings, bias, TOKENS, shares())
    found = reconstruction_error(*map(tf.constant, arrays))
    expected = np.sum((codes @ embeddings.T + bias - vectors()) ** 2, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    nothing = reconstruction_error(
        tf.zeros([3, DIM], tf.float64), *map(tf.constant, (embeddings, 0 * bias, *arrays[3:]))
    )
    assert nothing.numpy() == pytest.approx([1, 1, 0])  # the last row has no word
