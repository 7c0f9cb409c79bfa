"""Tables, such as word embeddings, of which a step reads and trains a few rows.

A dense optimizer passes over the whole table at every step: also a row whose gradient is zero
moves on with its momentum, and its moments decay. Here a row is left alone until it is next read
or trained, and is then brought to where the dense optimizer would have it, in closed form. So a
step's cost follows the words of its batch and not the vocabulary, and the result is the dense
optimizer's up to rounding.

While a row has no gradient its moments only decay, and it moves, in the j-th step after step s, by

    a(s+j) b1^j m / (b2^(j/2) sqrt(v) + e(s+j)),    r = b1 / sqrt(b2)

with a the step size and e the epsilon of that step. The sum over n steps is taken as

    C m / (sqrt(v) + E),    C = sum a(s+j) r^j,    E = sum e(s+j) a(s+j) r^j b2^(-j/2) / C

which is exact in a and in first order in e: what is left is the variance of b2^(-j/2) over a few
dozen steps, under 1e-4 of the sum. With F(s) = r (a(s+1) + F(s+1)), C is F(s) - r^n F(s+n), so two
numbers a step, made once, give the sum for any n.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.distribution.distributor import Distributor, update_each_copy
from trainer.training.gradients import Gradient
from trainer.variables import looked_up_by

SETTLED_ROWS = 4096


class Rule(NamedTuple):
    """What an optimizer does, in arrays of which entry k is for step k, from 1; entry 0 is unused.

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
    """Returns the rule of one of config.OPTIMIZERS for `steps` steps.

    Args:
      factor, frozen_steps: see optimizer.Rate.
    """
    k = np.arange(steps + 1.0)
    schedule = optimizer._learning_rate
    plain = np.full(steps + 1, float(schedule)) if not callable(schedule) else np.array(
        schedule(tf.maximum(tf.range(steps + 1) - 1, 0)), np.float64
    )  # fmt: skip
    rate = plain * factor * (k > frozen_steps)
    none, ones = np.zeros(steps + 1), np.ones(steps + 1)
    if isinstance(optimizer, keras.optimizers.SGD):
        return Rule(optimizer.momentum, None, -rate, -ones, none, none, ones)
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
    """One variable whose rows may be behind, and the optimizer's variables for it.

    Attributes:
      variable: [rows, ...].
      step_of_row: int64 [rows], the step up to which each row is as the dense optimizer's.
    """

    def __init__(
        self,
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

    def read(self, indices: tf.Tensor) -> tf.Tensor:
        """Returns the rows as the dense optimizer would have them; see `lookup`.

        The gradient goes to the rows, each once, as tf.IndexedSlices.
        """
        with tf.name_scope("read_rows"):
            distinct, positions = tf.unique(tf.reshape(indices, [-1]))
            held = tf.gather(self.variable.value, distinct)
            now = tf.convert_to_tensor(self._optimizer.iterations)
            # The value is the first term, the gradient the second's.
            rows = tf.stop_gradient(self._rows(distinct, now)[0]) + (held - tf.stop_gradient(held))
            rows = tf.gather(rows, positions)
            return tf.reshape(rows, tf.concat([tf.shape(indices), tf.shape(rows)[1:]], 0))

    def _rows(self, indices: tf.Tensor, now: tf.Tensor) -> list[tf.Tensor]:
        """Returns the weights and the moments of the rows as they are after step `now`."""
        weights, *moments = (tf.gather(v.value, indices) for v in (self.variable, *self._moments))
        last = tf.gather(self.step_of_row.value, indices)
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
        """Returns float64 [rows] so that it multiplies rows of the variable."""
        shape = [-1] + [1] * (len(self.variable.shape) - 1)
        return tf.cast(tf.reshape(values, shape), self.variable.dtype)

    def train(self, gradient: tf.IndexedSlices, variable: tf.Variable) -> None:
        """Applies the gradient of one step to its rows, each named once."""
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

    def settle(self, indices: tf.Tensor, variable: tf.Variable) -> None:
        """Brings the rows up to date."""
        now = tf.convert_to_tensor(self._optimizer.iterations)
        self._write(indices, variable, self._rows(indices, now), now)

    def _write(
        self, indices: tf.Tensor, variable: tf.Variable, values: list[tf.Tensor], step: tf.Tensor
    ) -> None:
        steps = tf.fill([tf.size(indices)], step)
        for held, rows in zip(
            (variable, *self._moments, self.step_of_row), (*values, steps), strict=True
        ):
            self._optimizer.assign(held, tf.IndexedSlices(rows, indices))


class Tables:
    """All tables of an optimizer; none where no gradient is of a few rows. Makes variables.

    Args:
      optimizer: built for `variables`, in their order.
      found: which of `variables` are tables, from `trace_gradients`.
      by_rows: which of those are trained by rows here. The others, of which the gradient is summed
        over workers as a dense one, Keras trains; none of their rows is ever behind.
      rules: how each variable is trained.
    """

    def __init__(
        self,
        distributor: Distributor,
        optimizer: keras.optimizers.Optimizer,
        variables: Sequence[keras.Variable],
        found: Sequence[bool],
        by_rows: Sequence[bool],
        rules: Sequence[Rule],
    ):
        self._optimizer = optimizer
        # Each has its counts, so that a checkpoint fits any number of workers.
        tables = {
            i: Table(optimizer, i, variables[i], rules[i]) for i, yes in enumerate(found) if yes
        }
        self._by_rows = {i: table for i, table in tables.items() if by_rows[i]}
        self._dense = [table for i, table in tables.items() if not by_rows[i]]
        self._settle_by_rows = [_settling(distributor, t) for t in self._by_rows.values()]
        self._settle_dense = [_settling(distributor, t) for t in self._dense]
        self._train_dense = optimizer.update_step
        optimizer.update_step = self._update_step
        optimizer.exclude_from_weight_decay([t.variable for t in self._by_rows.values()])

    def _update_step(
        self, gradient: Gradient, variable: tf.Variable, learning_rate: float | tf.Tensor
    ) -> None:
        table = self._by_rows.get(self._optimizer._get_variable_index(variable))
        if table is None:
            self._train_dense(gradient, variable, learning_rate)
        else:
            table.train(gradient, variable)

    def read_up_to_date(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which `lookup` brings rows of these tables up to date."""
        return looked_up_by((t.variable.value, t.read) for t in self._by_rows.values())

    def settle(self) -> None:
        """Brings all rows up to date, for those who read the variables as they are."""
        for settle in self._settle_by_rows:
            settle()

    def before_save(self) -> None:
        """Makes the counts true of the tables that Keras trains."""
        for table in self._dense:
            step = tf.convert_to_tensor(self._optimizer.iterations)
            table.step_of_row.assign(tf.fill(table.step_of_row.shape, step))

    def after_restore(self) -> None:
        """Brings up to date what Keras is to train: another number of workers may have saved it."""
        for settle in self._settle_dense:
            settle()


def _settling(distributor: Distributor, table: Table) -> Callable[[], None]:
    """Returns what brings all rows of `table` up to date; it is traced once."""

    def step(start: tf.Tensor, stop: tf.Tensor) -> None:
        rows = tf.range(start, stop)
        update_each_copy(table.variable, lambda copy, rows: table.settle(rows, copy), rows)

    run = tf.function(lambda start, stop: distributor.run(step, start, stop), autograph=False)
    rows = table.variable.shape[0]

    def settle() -> None:
        for start in range(0, rows, SETTLED_ROWS):  # not at once: this takes several times the rows
            run(tf.constant(start), tf.constant(min(start + SETTLED_ROWS, rows)))

    return settle


class Traced(NamedTuple):
    """What one trace of a shard's gradients shows, by variable.

    Attributes:
      is_sparse: whether its gradient is of a few rows.
      is_table: whether it also is read by `lookup`.
      count_rows: batch -> how many distinct rows each gradient has, of the first local shard; 0
        for one that is whole. Of the gradients only the indices are used, so that TensorFlow
        computes nothing else.
    """

    is_sparse: list[bool]
    is_table: list[bool]
    count_rows: Callable[[dict[str, tf.Tensor]], list[tf.Tensor]]


def trace_gradients(
    distributor: Distributor,
    variables: Sequence[keras.Variable],
    gradients: Callable[[dict[str, tf.Tensor]], Sequence[Gradient]],
    batch_spec: Any,
) -> Traced:
    """Traces the gradients once, to see which are of a few rows; nothing is computed.

    Args:
      gradients: of a shard, for a batch.
    """
    read: set[int] = set()
    sparse: list[bool] = []

    def reader(i: int, table: tf.Variable) -> Callable[[tf.Tensor], tf.Tensor]:
        def remember(indices: tf.Tensor) -> tf.Tensor:
            read.add(i)
            return tf.gather(table, indices)

        return remember

    def count(batch: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        found = gradients(batch)
        sparse[:] = [isinstance(gradient, tf.IndexedSlices) for gradient in found]
        return [
            tf.size(tf.unique(g.indices)[0]) if isinstance(g, tf.IndexedSlices) else tf.constant(0)
            for g in found
        ]

    with looked_up_by((v.value, reader(i, v.value)) for i, v in enumerate(variables)):
        count_rows = tf.function(
            lambda batch: distributor.run(count, batch),
            input_signature=[batch_spec],
            autograph=False,
        )
        count_rows.get_concrete_function()
    is_table = [is_sparse and i in read for i, is_sparse in enumerate(sparse)]
    return Traced(sparse, is_table, count_rows)
