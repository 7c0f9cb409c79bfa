"""Initial states from context: what is known of a sequence before its first step."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer.models.lstm import WarmLSTM

UNKNOWN = -1


@keras.saving.register_keras_serializable(package="warmstate")
class ContextState(keras.layers.Layer):
    """Computes the initial state of an LSTM, [h, c], from the context of each row of a batch.

    One of three arguments says how:

      ids          a table: each id has a trained state; any other id has the mean of all
      hidden_units a network of one tanh layer, for context that is a vector
      burn_in      an LSTM that reads the first `burn_in` steps of observations

    The states of a table and of a network begin as zeros. `noise` adds Gaussian noise to h and c in
    training, so that later steps rely less on the exact state (Zimmermann, Grothmann and Tietz
    2012, "Forecasting with recurrent neural networks: 12 tricks").

    Example:
        h, c = ContextState(64, ids=["ann", "bob"])(author)  # string [batch]
        outputs = keras.layers.LSTM(64)(inputs, initial_state=[h, c])
    """

    def __init__(
        self,
        units: int,
        ids: Sequence[str] | int | None = None,
        hidden_units: int | None = None,
        burn_in: int | None = None,
        noise: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ):
        """Takes one of `ids`, `hidden_units` and `burn_in`.

        Args:
            units: Number of units of the LSTM.
            ids: The known ids: names, or how many, for integers 0, 1, ... from inputs.
            hidden_units: Size of the network's hidden layer.
            burn_in: Number of steps.
            noise: Standard deviation of the noise.
            seed: Seed for new weights and the noise.

        Raises:
            ValueError: None or several of the three are given, ids are repeated, or a number is
                out of range.
        """
        super().__init__(**kwargs)
        given = {"ids": ids, "hidden_units": hidden_units, "burn_in": burn_in}
        if len([value for value in given.values() if value is not None]) != 1:
            raise ValueError(f"{self.name}: give one of ids, hidden_units and burn_in; got {given}")
        self.ids = ids if ids is None or isinstance(ids, int) else list(ids)
        names = self.ids if isinstance(self.ids, list) else []
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: ids are repeated: {sorted(names)!r:.200}")
        self._num_ids = self.ids if isinstance(self.ids, int) else len(names)
        self.units, self.noise, self.seed = units, noise, seed
        self.hidden_units, self.burn_in = hidden_units, burn_in
        self._check_numbers()
        self._noise_seeds = keras.random.SeedGenerator(seed)
        if burn_in is not None:
            kernel = keras.initializers.GlorotUniform(seed)
            recurrent = keras.initializers.Orthogonal(seed=seed)
            self.reader = WarmLSTM(
                units,
                return_state=True,
                kernel_initializer=kernel,
                recurrent_initializer=recurrent,
                name="reader",
            )
        if hidden_units is not None:
            kernel = keras.initializers.GlorotUniform(seed)
            self.hidden = keras.layers.Dense(
                hidden_units, "tanh", kernel_initializer=kernel, name="hidden"
            )
            self.output_layer = keras.layers.Dense(
                2 * units, kernel_initializer="zeros", name="output"
            )

    def _check_numbers(self) -> None:
        ids = None if self.ids is None else self._num_ids
        sizes = {"units": self.units, "hidden_units": self.hidden_units, "burn_in": self.burn_in}
        for name, size in {**sizes, "ids": ids}.items():
            if size is not None and size < 1:
                raise ValueError(f"{self.name}: {name}={size} is less than 1")
        if self.noise < 0:
            raise ValueError(f"{self.name}: noise={self.noise} is negative")

    def build(self, context_shape: tuple[int | None, ...]) -> None:
        """Creates the weights."""
        if self.burn_in is not None:
            self.reader.build(context_shape)
        elif self.hidden_units is not None:
            self.hidden.build(context_shape)
            self.output_layer.build((None, self.hidden_units))
        else:
            if isinstance(self.ids, list):
                with tf.init_scope():
                    names = tf.lookup.KeyValueTensorInitializer(self.ids, tf.range(self._num_ids))
                    self._numbers = tf.lookup.StaticHashTable(names, UNKNOWN)
            self.table = self.add_weight((self._num_ids, 2 * self.units), "zeros", name="table")
        self.built = True

    def call(self, context: Any, training: bool | None = None) -> list[tf.Tensor]:
        """Returns [h, c], each [batch, units].

        Args:
            context: Ids, strings or integers [batch] or [batch, 1]; a vector, [batch, features]; or
                observations, [batch, time, features], of which the first `burn_in` are read.
            training: Whether to add noise.
        """
        if self.burn_in is not None:
            _, *state = self.reader(context[:, : self.burn_in], training=training)
        elif self.hidden_units is not None:
            state = tf.split(self.output_layer(self.hidden(context)), 2, axis=1)
        else:
            state = tf.split(self._of_ids(tf.reshape(context, [-1])), 2, axis=1)
        if training and self.noise:
            state = [
                part
                + keras.random.normal(tf.shape(part), stddev=self.noise, seed=self._noise_seeds)
                for part in state
            ]
        return list(state)

    def _of_ids(self, ids: tf.Tensor) -> tf.Tensor:
        table = tf.convert_to_tensor(self.table)
        if isinstance(self.ids, list):
            ids = self._numbers.lookup(ids)
        known = (ids >= 0) & (ids < table.shape[0])
        rows = tf.gather(table, tf.where(known, ids, tf.zeros_like(ids)))
        # The mean is not trained through: unknown ids have what the known ones have learned.
        mean = tf.cond(
            tf.reduce_all(known),
            lambda: tf.zeros_like(table[0]),
            lambda: tf.stop_gradient(tf.reduce_mean(table, axis=0)),
        )
        return tf.where(known[:, None], rows, mean)

    def compute_output_shape(self, context_shape: tuple[int | None, ...]) -> list[Any]:
        """Returns the shapes of h and c."""
        return [(context_shape[0], self.units)] * 2

    def compute_output_spec(self, context: Any, training: bool | None = None) -> list[Any]:
        """Returns the shapes and types of h and c; see `keras.layers.Layer`."""
        shapes = self.compute_output_shape(context.shape)
        return [keras.KerasTensor(shape, self.compute_dtype) for shape in shapes]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("units", "ids", "hidden_units", "burn_in", "noise", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
