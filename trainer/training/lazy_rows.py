"""Tables, such as embeddings, of which a step reads and trains only a few rows.

A dense optimizer passes over the whole table at every step: momentum moves rows whose gradient is
zero, and their moments decay. Here such a row stays behind until it is next read or trained. It is
then brought to where the dense optimizer would have it, in closed form. So the cost of a step
depends on the words of its batch, not on the vocabulary, and the result is the dense optimizer's
up to rounding.

While a row has no gradient its moments only decay. In the j-th step after step s it moves by

    a(s+j) b1^j m / (b2^(j/2) sqrt(v) + e(s+j)),    r = b1 / sqrt(b2)

with step size a and epsilon e of that step. The sum over n steps is taken as

    C m / (sqrt(v) + E),    C = sum a(s+j) r^j,    E = sum e(s+j) a(s+j) r^j b2^(-j/2) / C

This is exact in a and first order in e. The error is the variance of b2^(-j/2) over a few dozen
steps, under 1e-4 of the sum. With F(s) = r (a(s+1) + F(s+1)), C is F(s) - r^n F(s+n), so two
precomputed numbers per step give the sum for any n.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.distribution.distributor import Distributor, update_each_copy
from trainer.distribution.variables import looked_up_by, take_rows
from trainer.training.gradients import ShardGradients

SETTLED_ROWS = 4096


class Rule(NamedTuple):
    """An optimizer's update, in arrays whose entry k is for step k, from 1; entry 0 is unused.

    m' = beta_1 m + gain g and v' = beta_2 v + (1 - beta_2) g^2 are the moments, and

        x' = keep x - (step_size m' + nesterov g) / (sqrt(v') + epsilon)

    is the weight. Without second moments (`beta_2` is None) the divisor is 1.
    """

    beta_1: float
    beta_2: float | None
    gain: np.ndarray
    step_size: np.ndarray
    nesterov: np.ndarray
    epsilon: np.ndarray
    keep: np.ndarray


def rule_of(
    optimizer: keras.optimizers.Optimizer, steps: int, factor: float = 1.0, frozen_steps: int = 0
) -> Rule:
    """Returns the rule of an optimizer for `steps` steps.

    Args:
        optimizer: SGD, Adam, AdamW or Nadam of Keras.
        factor: See optimizer.Rate.
        frozen_steps: See optimizer.Rate.

    Raises:
        TypeError: It is none of these.
    """
    k = np.arange(steps + 1.0)
    schedule = optimizer._learning_rate
    plain = np.array(schedule(tf.maximum(tf.range(steps + 1) - 1, 0)), np.float64)
    rate = plain * factor * (k > frozen_steps)
    none, ones = np.zeros(steps + 1), np.ones(steps + 1)
    if isinstance(optimizer, keras.optimizers.SGD):
        return Rule(optimizer.momentum, None, -rate, -ones, none, none, ones)
    if not isinstance(optimizer, keras.optimizers.Adam | keras.optimizers.Nadam):
        raise TypeError(f"{type(optimizer).__name__} has no rule for training by rows")
    b1, b2, epsilon = optimizer.beta_1, optimizer.beta_2, optimizer.epsilon
    gain, debias = np.full(steps + 1, 1 - b1), np.sqrt(1 - b2**k)
    if isinstance(optimizer, keras.optimizers.Nadam):
        u = b1 * (1 - 0.5 * 0.96 ** np.arange(steps + 2.0))
        product = np.cumprod(np.concatenate([[1.0], u[1:]]))
        momentum = rate * debias * u[1:] / (1 - product[1:])
        nesterov = rate * debias * (1 - u[:-1]) / np.maximum(1 - product[:-1], 1e-30)
        return Rule(b1, b2, gain, momentum, nesterov, epsilon * debias, ones)
    step_size = rate * debias / np.maximum(1 - b1**k, 1e-30)
    keep = 1 - plain * (optimizer.weight_decay or 0.0)
    return Rule(b1, b2, gain, step_size, none, epsilon * ones, keep)


def _tail(values: np.ndarray, ratio: float) -> np.ndarray:
    """Returns F with F[s] = ratio * (values[s + 1] + F[s + 1]) and F[last] = 0."""
    sums = [0.0]
    for value in values[:0:-1].tolist():
        sums.append(ratio * (value + sums[-1]))
    return np.array(sums[::-1])


class Table:
    """A variable whose rows may be behind, and the optimizer's variables for it.

    Attributes:
        variable: [rows, ...].
        step_of_row: int64 [rows], the step up to which each row equals the dense optimizer's.
    """

    def __init__(
        self,
        distributor: Distributor,
        optimizer: keras.optimizers.Optimizer,
        index: int,
        variable: keras.Variable,
        rule: Rule,
    ):
        self.variable = variable
        self._optimizer = optimizer
        self._rule = rule
        slots = [optimizer.momentums] if rule.beta_2 is None else [
            optimizer._momentums, optimizer._velocities
        ]  # fmt: skip
        self._moments = [slot[index] for slot in slots]
        self.step_of_row = optimizer.add_variable(
            (variable.shape[0],), dtype="int64", name=f"table_{index}_rowsteps"
        )
        self._decay = rule.beta_1 / np.sqrt(rule.beta_2 or 1.0)
        self._epsilon_decay = rule.beta_1 / (rule.beta_2 or 1.0)
        kept = np.cumprod(np.concatenate([[1.0], rule.keep[1:]]))
        moved = rule.step_size / kept
        tails = [_tail(moved, self._decay), _tail(moved * rule.epsilon, self._epsilon_decay), kept]
        each = [rule.gain, rule.step_size, rule.nesterov, rule.epsilon, rule.keep]
        # Tensors, so that graphs refer to them and do not hold copies.
        self._sums, self._steps = (tf.constant(np.stack(rows, axis=1)) for rows in (tails, each))
        self._settle = tf.function(
            lambda start, stop: distributor.run(self._settle_block, start, stop), autograph=False
        )

    def read(self, indices: tf.Tensor) -> tf.Tensor:
        """Returns the rows as the dense optimizer would have them.

        The gradient goes to the distinct rows, as tf.IndexedSlices.
        """
        with tf.name_scope("read_rows"):
            distinct, positions = tf.unique(tf.reshape(indices, [-1]))
            held = take_rows(self.variable.value, distinct)
            now = tf.convert_to_tensor(self._optimizer.iterations)
            # The first term has the value, the second the gradient.
            rows = tf.stop_gradient(self._rows(distinct, now)[0]) + (held - tf.stop_gradient(held))
            rows = tf.gather(rows, positions)
            return tf.reshape(rows, tf.concat([tf.shape(indices), tf.shape(rows)[1:]], 0))

    def _rows(self, indices: tf.Tensor, now: tf.Tensor) -> list[tf.Tensor]:
        """Returns the weights and the moments of the rows as they are after step `now`."""
        weights, *moments = (take_rows(v.value, indices) for v in (self.variable, *self._moments))
        last = take_rows(self.step_of_row.value, indices)
        missed = tf.cast(now - last, tf.float64)
        tail, epsilon_tail, kept = tf.unstack(tf.gather(self._sums, last), axis=1)
        tail_now, epsilon_tail_now, kept_now = tf.unstack(self._sums[now])
        total = tail - tf.pow(tf.constant(self._decay, tf.float64), missed) * tail_now
        first = self._column(tf.pow(tf.constant(self._rule.beta_1, tf.float64), missed))
        weights *= self._column(kept_now / kept)
        moved = moments[0] * self._column(kept_now * total)
        if self._rule.beta_2 is None:
            return [weights - moved, moments[0] * first]
        epsilon_total = epsilon_tail - (
            tf.pow(tf.constant(self._epsilon_decay, tf.float64), missed) * epsilon_tail_now
        )
        epsilon = self._optimizer.epsilon
        mean_epsilon = tf.clip_by_value(
            tf.math.divide_no_nan(epsilon_total, total), 0.01 * epsilon, 2 * epsilon
        )
        weights -= moved / (tf.sqrt(moments[1]) + self._column(mean_epsilon))
        second = self._column(tf.pow(tf.constant(self._rule.beta_2, tf.float64), missed))
        return [weights, moments[0] * first, moments[1] * second]

    def _column(self, values: tf.Tensor) -> tf.Tensor:
        """Returns float64 [rows] shaped so that it multiplies rows of the variable."""
        shape = [-1] + [1] * (len(self.variable.shape) - 1)
        return tf.cast(tf.reshape(values, shape), self.variable.dtype)

    def train(self, gradient: tf.IndexedSlices, variable: tf.Variable) -> None:
        """Applies the gradient of one step to its distinct rows, in the copy `variable`."""
        now = tf.convert_to_tensor(self._optimizer.iterations)
        weights, *moments = self._rows(gradient.indices, now)
        g, dtype = tf.cast(gradient.values, weights.dtype), weights.dtype
        gain, step_size, nesterov, epsilon, keep = tf.unstack(tf.cast(self._steps[now + 1], dtype))
        moments[0] = self._rule.beta_1 * moments[0] + gain * g
        moved = step_size * moments[0]
        if self._rule.beta_2 is not None:
            moments[1] += (g * g - moments[1]) * (1 - self._rule.beta_2)
            moved = (moved + nesterov * g) / (tf.sqrt(moments[1]) + epsilon)
        self._write(gradient.indices, variable, [keep * weights - moved, *moments], now + 1)

    def settle(self) -> None:
        """Brings all rows up to date, outside of a step."""
        # In blocks, because it takes several times the memory of the rows.
        rows = self.variable.shape[0]
        for start in range(0, rows, SETTLED_ROWS):
            self._settle(tf.constant(start), tf.constant(min(start + SETTLED_ROWS, rows)))

    def _settle_block(self, start: tf.Tensor, stop: tf.Tensor) -> None:
        def settle(copy: tf.Variable, rows: tf.Tensor) -> None:
            now = tf.convert_to_tensor(self._optimizer.iterations)
            self._write(rows, copy, self._rows(rows, now), now)

        update_each_copy(self.variable, settle, tf.range(start, stop))

    def _write(
        self, indices: tf.Tensor, variable: tf.Variable, values: list[tf.Tensor], step: tf.Tensor
    ) -> None:
        steps = tf.fill([tf.size(indices)], step)
        for held, rows in zip(
            (variable, *self._moments, self.step_of_row), (*values, steps), strict=True
        ):
            self._optimizer.assign(held, tf.IndexedSlices(rows, indices))


class Traced(NamedTuple):
    """What one trace of a shard's gradients shows, by variable.

    Attributes:
        is_sparse: Whether the batch gives a few rows of the gradient only.
        is_table: Whether all of the gradient is these rows, and the variable is read by `lookup`.
        count_rows: Batch -> number of distinct rows of each gradient on the first local shard; 0
            for a dense one. It uses indices only, so that TensorFlow computes nothing else.
    """

    is_sparse: list[bool]
    is_table: list[bool]
    count_rows: Callable[[dict[str, tf.Tensor]], list[tf.Tensor]]


def trace_gradients(
    distributor: Distributor,
    variables: Sequence[keras.Variable],
    gradients: Callable[[dict[str, tf.Tensor]], ShardGradients],
    batch_spec: Any,
) -> Traced:
    """Traces the gradients once, to see which have a few rows; computes nothing.

    Args:
        gradients: Batch -> what a shard gives, inside a step.
        batch_spec: Types and shapes of a batch.
    """
    read: set[int] = set()
    sparse: list[bool] = []
    whole: list[bool] = []

    def remember(i: int, indices: tf.Tensor) -> tf.Tensor:
        read.add(i)
        return take_rows(variables[i].value, indices)

    def count(batch: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        shard = gradients(batch)
        sparse[:] = [isinstance(gradient, tf.IndexedSlices) for gradient in shard.gradients]
        whole[:] = [g is not None for g in shard.through_statistics(shard.of_statistics)]
        return [
            tf.size(tf.unique(g.indices)[0]) if isinstance(g, tf.IndexedSlices) else tf.constant(0)
            for g in shard.gradients
        ]

    count_rows = tf.function(
        lambda batch: distributor.run(count, batch), input_signature=[batch_spec], autograph=False
    )
    lookups = [(v.value, functools.partial(remember, i)) for i, v in enumerate(variables)]
    with looked_up_by(lookups):
        count_rows.get_concrete_function()
    is_table = [
        is_sparse and i in read and not is_whole
        for i, (is_sparse, is_whole) in enumerate(zip(sparse, whole, strict=True))
    ]
    return Traced(sparse, is_table, count_rows)
