import keras
import numpy as np

from trainer.models.encoder import ChronoBias, Encoder, dropout


def test_chrono_bias_spreads_the_cells_memories() -> None:
    bias = ChronoBias(longest=50, seed=1)((4 * 1000,), "float32").numpy()
    inputs, forget, candidate, output = np.split(bias, 4)
    np.testing.assert_array_equal(inputs, -forget)
    assert not candidate.any() and not output.any()
    steps = np.exp(forget)
    assert 1 <= steps.min() < 2 and 49 < steps.max() <= 50
    assert abs(steps.mean() - 25.5) < 1.5
    np.testing.assert_array_equal(bias, ChronoBias(longest=50, seed=1)((4000,), "float32"))


def test_an_encoder_starts_with_it_and_is_a_function_of_its_seed() -> None:
    first, again, other = (Encoder(30, 4, 6, seed=s, memory_steps=20) for s in (1, 1, 2))
    for encoder in (first, again, other):
        encoder.build()
    forget = first.lstm.cell.bias.numpy()[6:12]
    assert forget.min() >= 0 and forget.max() <= np.log(20)
    for name in ("embeddings", "initial_h"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    for a, b in zip(first.lstm.weights, again.lstm.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.embeddings.numpy() != other.embeddings.numpy()).any()


def test_config_round_trip() -> None:
    encoder = Encoder(30, 4, 6, seed=1, memory_steps=20)
    again = Encoder.from_config(encoder.get_config())
    assert again.get_config() == encoder.get_config()
    bias = keras.initializers.deserialize(keras.initializers.serialize(ChronoBias(9, 2)))
    assert (bias.longest, bias.seed) == (9, 2)


def test_no_dropout_is_the_same_tensor() -> None:
    x = np.ones(3)
    assert dropout(x, 0.0, None) is x
