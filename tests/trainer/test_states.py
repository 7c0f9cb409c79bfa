import numpy as np
import pytest
import tensorflow as tf

from trainer import states
from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import make_distributor
from trainer.models.encoder import Encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    encoder = Encoder(20, 4, 5, seed=3)
    encoder.build()
    encoder.initial_c.assign(np.linspace(-1, 1, 5))
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
    final = {"h": [], "c": []}
    for batch in batches():
        for row in np.flatnonzero(batch["weights"].numpy()):
            length = int(batch["lengths"][row])
            _, h, c = encoder(batch["tokens"][row : row + 1, :length], tf.constant([length]))
            final["h"].append(h[0])
            final["c"].append(c[0])
    assert len(final["h"]) == 9
    np.testing.assert_allclose(mean.h, np.mean(final["h"], 0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(mean.c, np.mean(final["c"], 0), rtol=1e-5, atol=1e-7)
    assert mean.h.dtype == mean.c.dtype == np.float32


def test_apply_sets_what_the_encoder_starts_from() -> None:
    encoder = Encoder(20, 4, 5, seed=3)
    encoder.build()
    state = states.LearnedState(np.full(5, 0.5, np.float32), np.arange(5, dtype=np.float32))
    states.apply(encoder, state)
    np.testing.assert_array_equal(states.learned(encoder).c, state.c)
    h, c = encoder.start(3)
    np.testing.assert_array_equal(h, np.tile(state.h, (3, 1)))
    np.testing.assert_array_equal(c, np.tile(state.c, (3, 1)))


def test_a_state_of_another_size_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\) does not fit .*\(5,\)"):
        states.apply(encoder, states.zero(4))
