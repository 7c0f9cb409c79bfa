"""The recurrent encoder: word embeddings, one LSTM, and the state that the LSTM starts from."""

import keras
import numpy as np
import tensorflow as tf

from trainer.models.lstm import WarmLSTM


def token_mask(tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Returns bool [batch, time]: True where `tokens` holds a token, False at padding."""
    return tf.sequence_mask(lengths, tf.shape(tokens)[1])


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor) -> tf.Tensor:
    """Returns `x` with a fraction `rate` of its elements zeroed and the others scaled up."""
    return tf.nn.experimental.stateless_dropout(x, rate, seed) if rate else x


@keras.saving.register_keras_serializable(package="warmstate")
class ChronoBias(keras.initializers.Initializer):
    """LSTM biases with which cells start out remembering for 1 to `longest` steps.

    Forget gates start at log(t), input gates at -log(t), t uniform in [1, longest) by cell: each
    cell is then an average over about t steps, which neither forgets a document's start nor
    saturates. Tallec & Ollivier 2018, section 3.
    """

    def __init__(self, longest: int, seed: int):
        self.longest = longest
        self.seed = seed

    def __call__(self, shape: tuple[int], dtype: str | None = None) -> tf.Tensor:
        """Returns the bias [4 * units]: input, forget, candidate, output gate, as in Keras."""
        units = shape[0] // 4
        random = np.random.Generator(np.random.Philox(self.seed))
        forget = np.log(random.uniform(1.0, max(self.longest, 1.0 + 1e-6), units))
        return tf.constant(np.concatenate([-forget, forget, np.zeros(2 * units)]), dtype)

    def get_config(self) -> dict:
        return {"longest": self.longest, "seed": self.seed}


class Encoder(keras.layers.Layer):
    """Reads tokens into a sequence of outputs and a final hidden and cell state.

    Attributes:
      embeddings: [vocab_size, embedding_dim].
      embedding_scale: new embeddings are uniform in its bounds, plus and minus.
      memory_steps: how long cells start out remembering, at the most; see ChronoBias.
      initial_h, initial_c: [units], the state that reading starts from unless one is given.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        units: int,
        seed: int,
        memory_steps: int = 100,
        embedding_scale: float = 0.05,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.units = units
        self.seed = seed
        self.memory_steps = memory_steps
        self.embedding_scale = embedding_scale
        initializers = keras.initializers
        self.lstm = WarmLSTM(
            units,
            return_sequences=True,
            return_state=True,
            kernel_initializer=initializers.GlorotUniform(seed=seed + 1),
            recurrent_initializer=initializers.Orthogonal(seed=seed + 2),
            bias_initializer=ChronoBias(memory_steps, seed=seed + 6),
            unit_forget_bias=False,
            seed=seed,
            name="lstm",
        )

    def build(self, input_shape: tuple | None = None) -> None:
        """Makes the weights; the shape of the tokens does not matter."""
        self.embeddings = self.add_weight(
            shape=(self.vocab_size, self.embedding_dim),
            initializer=keras.initializers.RandomUniform(
                -self.embedding_scale, self.embedding_scale, seed=self.seed
            ),
            name="embeddings",
        )
        self.initial_h = self.add_weight(shape=(self.units,), initializer="zeros", name="initial_h")
        self.initial_c = self.add_weight(shape=(self.units,), initializer="zeros", name="initial_c")
        self.lstm.build((None, None, self.embedding_dim))
        self.built = True

    def embed(self, tokens: tf.Tensor) -> tf.Tensor:
        """Returns the tokens' embeddings: [batch, time, embedding_dim]."""
        return tf.nn.embedding_lookup(self.embeddings.value, tokens)

    def start(self, batch_size: tf.Tensor) -> list[tf.Tensor]:
        """Returns the initial state for a batch: [h, c], each [batch, units]."""
        shape = [batch_size, self.units]
        return [
            tf.broadcast_to(tf.convert_to_tensor(state), shape)
            for state in (self.initial_h, self.initial_c)
        ]

    def read(
        self, embedded: tf.Tensor, mask: tf.Tensor, state: list[tf.Tensor], training: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Runs the LSTM from `state` over `embedded`.

        Args:
          embedded: [batch, time, embedding_dim].
          mask: bool [batch, time], False at padding.
          state: [h, c], each [batch, units].
          training: whether a gradient will be taken: the LSTM then keeps its activations.

        Returns:
          (outputs [batch, time, units], h [batch, units], c [batch, units]), h and c as they
          are after each row's last token.
        """
        return self.lstm(embedded, mask=mask, initial_state=state, training=training)

    def call(self, tokens: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Reads `tokens` from the encoder's own initial state, without training.

        Returns what `read` returns.
        """
        state = self.start(tf.shape(tokens)[0])
        mask = token_mask(tokens, lengths)
        return self.read(self.embed(tokens), mask, state, training=False)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "vocab_size": self.vocab_size,
            "embedding_dim": self.embedding_dim,
            "units": self.units,
            "seed": self.seed,
            "memory_steps": self.memory_steps,
            "embedding_scale": self.embedding_scale,
        }
