import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from tests import forked
from tests.conftest import REPOSITORY
from trainer import states
from trainer.distribution.cluster import Cluster
from trainer.distribution.make import make_distributor
from trainer.models.encoder import Encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    encoder = Encoder(20, 4, 5, seed=3, num_layers=2)
    encoder.build()
    for _, c in encoder.initial_states:
        c.assign(np.linspace(-1, 1, 5))
    return encoder


def batches() -> tf.data.Dataset:
    random = np.random.default_rng(0)
    tokens = random.integers(3, 20, (3, 4, 6)).astype(np.int32)
    return tf.data.Dataset.from_tensor_slices(
        {
            "tokens": tokens,
            "lengths": random.integers(1, 7, (3, 4)).astype(np.int32),
            "labels": np.zeros((3, 4), np.int32),
            "weights": np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], np.float32),
        }
    )


def test_the_mean_state_is_the_mean_of_the_final_states(encoder: Encoder) -> None:
    distributor = make_distributor("one_device", Cluster(0, 1), 10)
    mean = states.mean(distributor, encoder, batches())
    final = []
    for batch in batches():
        for row in np.flatnonzero(batch["weights"].numpy()):
            length = int(batch["lengths"][row])
            _, found = encoder(batch["tokens"][row : row + 1, :length], tf.constant([length]))
            final.append([[part[0] for part in state] for state in found])
    assert len(final) == 9
    assert len(mean) == 2 and all(part.dtype == np.float32 for state in mean for part in state)
    np.testing.assert_allclose(mean, np.mean(final, 0), rtol=1e-5, atol=1e-7)


def test_apply_sets_what_the_encoder_starts_from() -> None:
    encoder = Encoder(20, 4, 5, seed=3, num_layers=2)
    encoder.build()
    wanted = np.arange(20, dtype=np.float32).reshape(2, 2, 5)
    states.apply(encoder, [states.LearnedState(*state) for state in wanted])
    np.testing.assert_array_equal(states.learned(encoder), wanted)
    for state, (h, c) in zip(wanted, encoder.start(3), strict=True):
        np.testing.assert_array_equal(h, np.tile(state[0], (3, 1)))
        np.testing.assert_array_equal(c, np.tile(state[1], (3, 1)))


def test_states_that_do_not_fit_are_refused(encoder: Encoder) -> None:
    good, other = (states.LearnedState(np.zeros(n), np.zeros(n)) for n in (5, 4))
    before = states.learned(encoder)
    with pytest.raises(ValueError, match=r"lstm_1 takes h of shape \(5,\), but got \(4,\)"):
        states.apply(encoder, [good, other])
    with pytest.raises(ValueError, match="1 states for 2 LSTMs"):
        states.apply(encoder, [good])
    np.testing.assert_array_equal(states.learned(encoder), before)


def test_importing_it_defines_no_flags_and_imports_no_training() -> None:
    program = (
        "import sys; from trainer import states; from absl import flags;"
        "print(*(m for m in sys.modules if m.startswith('trainer.')));"
        "print([m for m in flags.FLAGS.flags_by_module_dict() if 'trainer' in m])"
    )
    found = forked.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    modules, with_flags = found.stdout.splitlines()
    assert with_flags == "[]" and "trainer.states" in modules.split()
    training = {"bundle", "checkpoint", "config", "loop", "main", "reporting", "stages"}
    assert not training & {module.split(".")[1] for module in modules.split()}


def test_states_of_a_bundle(encoder_bundle: Path, tmp_path: Path) -> None:
    learned, mean = states.load(encoder_bundle), states.load(encoder_bundle, "mean")
    assert [s.c.tolist() for s in learned] == [[0] * 5, [1] * 5]
    assert [s.h.tolist() for s in mean] == [[1] * 5, [1] * 5]
    with pytest.raises(ValueError, match="name='zero' is not one of learned, mean"):
        states.load(encoder_bundle, "zero")
    with pytest.raises(InputError, match="is no encoder bundle"):
        states.load(tmp_path)


def test_a_loaded_encoder_reads_text(encoder_bundle: Path) -> None:
    encoder = states.load_encoder(encoder_bundle)
    texts = ["A fine film.", "", "I did not like it, not at all; neither did she."]
    found = states.from_encoder(encoder, texts, "encode")
    assert len(found) == 2 and found[0].h.shape == (3, 5)
    for row, text in enumerate(texts):
        ids = encoder.tokenizer.encode([text])[0].numpy()
        _, expected = encoder.encoder(ids[None], np.array([len(ids)]))
        for state, (h, c) in zip(found, expected, strict=True):
            np.testing.assert_allclose(state.h[row], h[0], atol=1e-6)
            np.testing.assert_allclose(state.c[row], c[0], atol=1e-6)
    outputs, _ = encoder.of_texts(texts)
    np.testing.assert_allclose(outputs[2, -1], found[1].h[2], atol=1e-6)
    mean = states.from_encoder(encoder, tf.data.Dataset.from_tensor_slices(texts).batch(2))
    np.testing.assert_allclose(mean, np.mean(found, axis=2), atol=1e-6)
    stock = keras.layers.LSTM(5)
    states.apply(stock, mean[1])
    np.testing.assert_array_equal(stock.initial_c, mean[1].c)
    with pytest.raises(ValueError, match="--stage=finetune"):
        encoder(texts, training=True)
