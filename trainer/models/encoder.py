"""The recurrent encoder: word embeddings and a stack of LSTMs with learned initial states."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.distribution.variables import lookup
from trainer.distribution.weight_statistics import of_weights
from trainer.models.lstm import WarmLSTM, Words

# For each layer of a stack, from the lowest: [h, c], each [batch, units].
States = list[list[tf.Tensor]]
SMALLEST_VARIANCE = 1e-6
# The seeds of a layer's initializers are the encoder's seed plus less than this.
_SEEDS_PER_LAYER = 1000


class LearnedState(NamedTuple):
    """The state of an LSTM: h and c, float32 [units], or [documents, units]."""

    h: np.ndarray
    c: np.ndarray


def token_mask(tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Returns bool [batch, time]: True where `tokens` holds a token, False at padding."""
    return tf.sequence_mask(lengths, tf.shape(tokens)[1])


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor) -> tf.Tensor:
    """Returns `x` with a fraction `rate` of its elements zeroed and the rest scaled up.

    Sixteen random bits decide for an element, so the fraction is a multiple of 2^-16.
    """
    if not rate:
        return x
    shape = tf.shape(x)
    size = tf.reduce_prod(shape)
    words = tf.random.stateless_uniform([(size + 1) // 2], seed, None, None, tf.uint32)
    bits = tf.reshape(tf.bitcast(words, tf.uint16), [-1])[:size]
    dropped = max(1, round(rate * 2**16))
    kept = tf.cast(tf.reshape(bits, shape) >= tf.constant(dropped, tf.uint16), x.dtype)
    return x * (kept * (2**16 / (2**16 - dropped)))


@contextlib.contextmanager
def dropped_weights(
    encoders: Sequence["Encoder"], rate: float, seed: tf.Tensor | None
) -> Iterator[None]:
    """Returns a context in which a fraction `rate` of the LSTMs' recurrent weights is zeroed.

    The rest is scaled up. One mask holds for the whole context, which is a training step (Merity et
    al. 2018, section 2: the weight-dropped LSTM).

    Args:
        seed: int32 [2], needed if rate is not 0.
    """
    lstms = [lstm for encoder in encoders for lstm in encoder.lstms] if rate else []
    before = [lstm.recurrent_mask for lstm in lstms]
    for number, lstm in enumerate(lstms):
        own = tf.random.experimental.stateless_fold_in(seed, number)
        lstm.recurrent_mask = dropout(tf.ones(lstm.cell.recurrent_kernel.shape), rate, own)
    try:
        yield
    finally:
        for lstm, mask in zip(lstms, before, strict=True):
            lstm.recurrent_mask = mask


@contextlib.contextmanager
def row_biases(encoder: "Encoder", biases: Sequence[tf.Tensor]) -> Iterator[None]:
    """Returns a context in which each row of a batch has its own LSTM biases.

    Args:
        encoder: Its own biases are not used meanwhile, unless `biases` is empty.
        biases: For each layer, [batch, 4 * units].
    """
    pairs = list(zip(encoder.lstms, biases, strict=True)) if biases else []
    for lstm, of_rows in pairs:
        lstm.row_bias = of_rows
    try:
        yield
    finally:
        for lstm, _ in pairs:
            lstm.row_bias = None


@keras.saving.register_keras_serializable(package="warmstate")
class ChronoBias(keras.initializers.Initializer):
    """LSTM biases with which cells initially remember 1 to `longest` steps.

    Forget gates start at log(t), input gates at -log(t), with t uniform in [1, longest) for each
    cell. A cell then averages over about t steps, so that it neither forgets a document's start nor
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

    def get_config(self) -> dict[str, Any]:
        return {"longest": self.longest, "seed": self.seed}


class Initial(NamedTuple):
    """How an encoder's weights are drawn."""

    memory_steps: int = 100  # longest initial memory of a cell; see ChronoBias
    embedding_scale: float = 0.05  # embeddings are uniform between minus and plus this


class Encoder(keras.layers.Layer):
    """Reads tokens into a sequence of outputs and a final hidden and cell state.

    Attributes:
        embeddings: [vocab_size, embedding_dim].
        normalised: Whether embeddings are normalised to mean 0 and variance 1 over the words of a
            text (Miyato et al. 2017, equation 1).
        frequencies: [vocab_size], of the words in a text, with sum 1; only if normalised.
        fixed_moments: See `fix_moments`; empty before.
        lstms: The stack, from the lowest layer; each reads the outputs of the one below. Their
            weights `initial_h` and `initial_c` are the learned initial state.
        initial: How new weights are drawn, beside the seed.
        precision: Keras's dtype policy of the LSTMs, whose inputs and outputs are float32.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        units: int,
        seed: int,
        initial: Initial = Initial(),  # noqa: B008 (it cannot be changed)
        num_layers: int = 1,
        normalised: bool = False,
        precision: str = "float32",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.units = units
        self.seed = seed
        self.initial = Initial(*initial)
        self.num_layers = num_layers
        self.normalised = normalised
        self.precision = precision
        self.fixed_moments: tuple[np.ndarray, ...] = ()
        self.lstms = [self._make_lstm(layer) for layer in range(num_layers)]

    def _make_lstm(self, layer: int) -> WarmLSTM:
        initializers = keras.initializers
        seed = self.seed + _SEEDS_PER_LAYER * layer
        lstm = WarmLSTM(
            self.units,
            return_sequences=True,
            return_state=True,
            kernel_initializer=initializers.GlorotUniform(seed=seed + 1),
            recurrent_initializer=initializers.Orthogonal(seed=seed + 2),
            bias_initializer=ChronoBias(self.initial.memory_steps, seed=seed + 6),
            unit_forget_bias=False,
            seed=seed,
            dtype=self.precision,
            initial_state="learned",
            name=f"lstm_{layer}",
        )
        lstm.right_padded = True  # see `token_mask`
        return lstm

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        """Creates the weights, which do not depend on the shape of the tokens."""
        self.embeddings = self.add_weight(
            shape=(self.vocab_size, self.embedding_dim),
            initializer=keras.initializers.RandomUniform(
                -self.initial.embedding_scale, self.initial.embedding_scale, seed=self.seed
            ),
            name="embeddings",
        )
        if self.normalised:
            self.frequencies = self.add_weight(
                shape=(self.vocab_size,),
                initializer=keras.initializers.Constant(1 / self.vocab_size),
                trainable=False,
                name="frequencies",
            )
        for layer, lstm in enumerate(self.lstms):
            lstm.build((None, None, self.units if layer else self.embedding_dim))
        self.built = True

    def embed(self, tokens: tf.Tensor) -> tf.Tensor:
        """Returns the tokens' embeddings: [batch, time, embedding_dim]."""
        if not self.normalised:
            return lookup(self.embeddings.value, tokens)
        mean, deviation = self.fixed_moments or of_weights(self.moments)
        return (tf.gather(self.embeddings.value, tokens) - mean) / deviation

    def words(self, tokens: tf.Tensor) -> Words:
        """Returns the tokens, each distinct one embedded once."""
        distinct, index = tf.unique(tf.reshape(tokens, [-1]))
        return Words(self.embed(distinct), tf.reshape(index, tf.shape(tokens)))

    def moments(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns mean and standard deviation of a text's embeddings: [embedding_dim] each."""
        table = tf.convert_to_tensor(self.embeddings)
        weights = tf.convert_to_tensor(self.frequencies)[:, None]
        mean = tf.reduce_sum(weights * table, axis=0)
        variance = tf.reduce_sum(weights * tf.square(table - mean), axis=0)
        return mean, tf.sqrt(variance + SMALLEST_VARIANCE)

    def fix_moments(self) -> None:
        """Computes once what embeddings are normalised by; weights must not change any more.

        Otherwise each call passes over the whole table, which takes longer than a short text.
        """
        if self.normalised:
            self.fixed_moments = tuple(value.numpy() for value in self.moments())

    def absorb_normalisation(self) -> None:
        """Adapts the lowest LSTM's weights, trained on plain embeddings, to normalised ones.

        Its outputs stay the same: x W + b is (x - mean) / deviation W' + b' with W' = deviation W
        and b' = b + mean W.
        """
        mean, deviation = (value.numpy() for value in self.moments())
        cell = self.lstms[0].cell
        kernel = cell.kernel.numpy()
        cell.bias.assign(cell.bias.numpy() + mean @ kernel)
        cell.kernel.assign(deviation[:, None] * kernel)

    def biases(self) -> list[np.ndarray]:
        """Returns each LSTM's bias [4 * units], as it is without normalised embeddings."""
        biases = [lstm.cell.bias.numpy() for lstm in self.lstms]
        if self.normalised:  # see `absorb_normalisation`
            mean, deviation = (value.numpy() for value in self.moments())
            biases[0] = biases[0] - (mean / deviation) @ self.lstms[0].cell.kernel.numpy()
        return biases

    @property
    def initial_states(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """The weights (h, c) of each layer's initial state, each [units]."""
        return [(lstm.initial_h, lstm.initial_c) for lstm in self.lstms]

    def start(self, batch_size: tf.Tensor) -> States:
        """Returns the initial state for a batch: for each layer [h, c], each [batch, units]."""
        shape = [batch_size, self.units]
        return [
            [tf.broadcast_to(tf.convert_to_tensor(part), shape) for part in state]
            for state in self.initial_states
        ]

    def read(
        self,
        embedded: tf.Tensor | Words,
        mask: tf.Tensor,
        states: States,
        training: bool,
        dropout_rate: float = 0.0,
        dropout_seed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, States]:
        """Runs the LSTMs from `states` over `embedded`.

        Args:
            embedded: [batch, time, embedding_dim], or from `words`.
            mask: bool [batch, time], False at padding.
            states: For each layer [h, c], each [batch, units].
            training: Whether a gradient will be taken: the LSTMs then keep their activations.
            dropout_rate: For outputs between layers.
            dropout_seed: int32 [2], needed if dropout_rate is not 0.

        Returns:
            The top layer's outputs [batch, time, units], and each layer's [h, c] after each row's
            last token.
        """
        outputs, final = embedded, []
        for layer, (lstm, state) in enumerate(zip(self.lstms, states, strict=True)):
            if layer and dropout_rate:
                seed = tf.random.experimental.stateless_fold_in(dropout_seed, layer)
                outputs = dropout(outputs, dropout_rate, seed)
            if isinstance(outputs, Words):
                outputs, *state = lstm.read_words(outputs, mask, state, training)
            else:
                outputs, *state = lstm(outputs, mask=mask, initial_state=state, training=training)
            final.append([tf.cast(part, self.embeddings.dtype) for part in state])
        return tf.cast(outputs, self.embeddings.dtype), final

    def call(self, tokens: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, States]:
        """Reads `tokens` from the encoder's initial state, without training; see `read`."""
        states = self.start(tf.shape(tokens)[0])
        mask = token_mask(tokens, lengths)
        return self.read(self.words(tokens), mask, states, training=False)

    def get_config(self) -> dict[str, Any]:
        names = ["vocab_size", "embedding_dim", "units", "seed", "initial"]
        names += ["num_layers", "normalised", "precision"]
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
