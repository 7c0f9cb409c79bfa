import numpy as np
import pytest
import tensorflow as tf

from trainer import states
from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import make_distributor
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
    with pytest.raises(ValueError, match=r"shape \(4,\) does not fit .*\(5,\)"):
        states.apply(encoder, [good, other])
    with pytest.raises(ValueError, match="1 states do not fit an encoder of 2 layers"):
        states.apply(encoder, [good])
    np.testing.assert_array_equal(states.learned(encoder), before)
