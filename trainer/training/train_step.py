"""One training step of all workers: gradients, their sum, division, clipping, the optimizer.

N workers compute what one would. Loss and gradients are sums over the tokens or examples of the
global batch, divided by their number after the reduction and then clipped by the global norm.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.config import Config
from trainer.distribution.distributor import Distributor
from trainer.distribution.over_batches import local_rows
from trainer.training.gradients import (
    Gradient,
    ShardGradients,
    added,
    divided,
    loss_and_gradients,
    norms_of,
)
from trainer.training.lazy_rows import trace_gradients
from trainer.training.loss_scale import LossScale
from trainer.training.optimizer import Optimizer
from trainer.training.reduction import choose_rows, reduce_gradients, rows_to_send
from trainer.training.task import Task

Batch = dict[str, tf.Tensor]


class Outcome(NamedTuple):
    """The result of a step on the global batch, the same in every worker."""

    loss: tf.Tensor  # mean loss, a scalar
    tokens: tf.Tensor  # number of tokens read, a scalar
    stops: tf.Tensor  # number of shards that were asked to stop, a scalar
    norms: tf.Tensor  # norm of each variable's gradient before clipping, [variables]

    def is_finite(self) -> bool:
        """Returns whether the loss and the gradients are finite."""
        return bool(np.isfinite(self.loss.numpy()) and np.isfinite(self.norms.numpy()).all())


class TrainStep:
    """A training step; each call trains on one global batch and is a collective.

    Without a loss scale and with --on_nonfinite=stop, a step is one tf.function, which applies
    whatever gradients there are. Otherwise it is two functions, because Keras cannot apply
    gradients inside a tf.cond under a strategy: the second one applies only finite gradients, and
    a step whose loss scale was too large is repeated with a smaller one.

    Args:
        task: The loss, the variables, and the state that rows carry.
        config: Flags of optimization and distribution, and --on_nonfinite.
        optimizer: Built for the task's variables; tables are made here, which adds variables.
        first: The run's first global batch, wherever it resumes: it decides how rows are reduced.
        loss_scale: For gradients in float16.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        distributor: Distributor,
        optimizer: Optimizer,
        first: tf.data.Dataset,
        loss_scale: LossScale | None = None,
    ):
        self._task = task
        self._config = config
        self._distributor = distributor
        self._optimizer = optimizer
        self._loss_scale = loss_scale
        self._variables = [variable.value for variable in task.variables.values()]
        self._applies_at_once = config.on_nonfinite == "stop" and loss_scale is None
        self._choose_rows(first)
        self.function = tf.function(
            self._run_shards,
            input_signature=[first.element_spec, tf.TensorSpec([], tf.float32)],
            autograph=False,
        )
        self._several = tf.function(self._run_several, autograph=False)
        if not self._applies_at_once:
            # From a traced graph: a table's gradient has any number of rows, so one trace suffices.
            _, _, gradients = self.function.get_concrete_function().structured_outputs
            self._apply = tf.function(
                lambda gradients: distributor.run(optimizer.apply, gradients),
                input_signature=[[tf.type_spec_from_value(gradient) for gradient in gradients]],
                autograph=False,
            )

    def __call__(self, batch: Batch, stop: tf.Tensor) -> Outcome:
        """Takes one step.

        Args:
            batch: This process's slice of the global batch.
            stop: 1 if this process was asked to stop, else 0: float32 [].
        """
        outcome, carried, gradients = self.function(batch, stop)
        if self._applies_at_once:
            return outcome
        scale = self._loss_scale
        while scale and np.isfinite(outcome.loss) and not outcome.is_finite() and scale.shrink():
            outcome, carried, gradients = self.function(batch, stop)
        if outcome.is_finite():
            self._apply(gradients)
            self._keep_carried(carried)
            if scale:
                scale.grow()
        return outcome

    def several(self, iterator: Iterator[Batch], count: int, stop: tf.Tensor) -> list[Outcome]:
        """Takes `count` steps in one call, for which the host waits; needs a step in one function.

        It ends early after a step that is not finite. Only the last outcome has its own norms.
        """
        losses, tokens, stops, norms = self._several(iterator, tf.constant(count), stop)
        done = len(losses)
        finite = tf.zeros_like(norms)
        return [
            Outcome(losses[i], tokens[i], stops, norms if i == done - 1 else finite)
            for i in range(done)
        ]

    def _run_shards(
        self, batch: Batch, stop: tf.Tensor
    ) -> tuple[Outcome, list[tf.Tensor], list[Gradient]]:
        outcome, carried, gradients = self._distributor.run(self._update, batch, stop)
        if self._applies_at_once:
            self._keep_carried(carried)
            carried = []
        return outcome, carried, gradients

    def _update(
        self, batch: Batch, stop: tf.Tensor
    ) -> tuple[Outcome, list[tf.Tensor], list[Gradient]]:
        """The whole update, on each shard; returns gradients only if they are not applied here."""
        config, distributor = self._config, self._distributor
        # 1. This shard's loss and gradients: sums over its rows, not means.
        with self._optimizer.reading_rows():
            shard = self._shard_gradients(batch)
        loss, weight = shard.loss, shard.weight
        tokens = _tokens_read(local_rows(distributor, batch), weight.dtype)
        carried = [self._in_global_batch(rows) for rows in shard.carried]
        gradients, counts = rows_to_send(distributor, shard.gradients, self._as_rows, weight.dtype)
        # 2. Sums over all shards. Reduced separately: ready before the backward pass.
        loss, weight, tokens, stop, counts, *carried = distributor.all_reduce_sum(
            [loss, weight, tokens, tf.cast(stop, weight.dtype), counts, *carried]
        )
        # 3. The mean over the global batch. Divided before the sum, which float16 could overflow.
        divisor = weight
        if self._loss_scale is not None:
            loss /= self._loss_scale.factor()
            divisor = weight * self._loss_scale.factor()
        small = shard.of_statistics
        gradients = [divided(gradient, divisor) for gradient in [*gradients, *small]]
        none = [False] * len(small)
        as_rows, by_rows = [*self._as_rows, *none], [*self._by_rows, *none]
        with tf.name_scope("collective"):
            gradients = reduce_gradients(
                distributor, gradients, as_rows, counts, config.compress, by_rows
            )
        # What the statistics of the weights give the tables, from the sum.
        own = len(self._variables)
        gradients = added(gradients[:own], shard.through_statistics(gradients[own:]))
        # 4. Clipping by the global norm.
        norm, norms = norms_of(gradients)
        gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm, use_norm=norm)
        # 5. The optimizer.
        if self._applies_at_once:
            with tf.name_scope("optimizer"):
                self._optimizer.apply(gradients)
            gradients = []
        return Outcome(loss / weight, tokens, stop, norms), carried, gradients

    def _shard_gradients(self, batch: Batch) -> ShardGradients:
        """Returns a shard's summed loss, its weight, its gradients, and what its rows carry."""
        rows = local_rows(self._distributor, batch)
        if self._task.carried is not None:
            start, stop = self._shard_range(self._task.carried.shape[0])
            rows["carried"] = self._task.carried.value[start:stop]

        def loss_sum(rows: Batch, part: int | tf.Tensor) -> tuple[tf.Tensor, ...]:
            loss, *others = self._task.loss_sum(rows, batch["step"], part)
            return (loss * self._loss_scale.factor() if self._loss_scale else loss, *others)

        shard, parts = self._distributor.shard(), self._config.accumulate_steps
        return loss_and_gradients(loss_sum, self._variables, rows, shard, parts)

    def _choose_rows(self, first: tf.data.Dataset) -> None:
        """Chooses which gradients travel as rows, and which tables are trained by rows."""
        distributor = self._distributor
        traced = trace_gradients(
            distributor,
            list(self._task.variables.values()),
            self._shard_gradients,
            first.element_spec,
        )
        self._as_rows = choose_rows(
            distributor,
            self._config.sparse_reduce,
            traced.is_sparse,
            traced.count_rows,
            first,
            [_whole_and_row_bytes(variable) for variable in self._variables],
        )
        self._by_rows = [
            is_table and (distributor.num_shards == 1 or travels_as_rows)
            for is_table, travels_as_rows in zip(traced.is_table, self._as_rows, strict=True)
        ]
        self._optimizer.train_by_rows(traced.is_table, self._by_rows)

    def _run_several(
        self, iterator: Iterator[Batch], count: tf.Tensor, stop: tf.Tensor
    ) -> tuple[Any, ...]:
        kinds = self.function.get_concrete_function().structured_outputs[0]

        def step(
            done: tf.Tensor, _: tf.Tensor, losses: Any, tokens: Any, *last: Any
        ) -> tuple[Any, ...]:
            outcome, *_ = self.function(next(iterator), stop)
            finite = tf.math.is_finite(outcome.loss)
            finite &= tf.reduce_all(tf.math.is_finite(outcome.norms))
            losses, tokens = losses.write(done, outcome.loss), tokens.write(done, outcome.tokens)
            return done + 1, finite, losses, tokens, outcome.stops, outcome.norms

        _, _, losses, tokens, stops, norms = tf.while_loop(
            lambda done, finite, *_: (done < count) & finite,
            step,
            (
                0,
                True,
                tf.TensorArray(kinds.loss.dtype, 0, dynamic_size=True),
                tf.TensorArray(kinds.tokens.dtype, 0, dynamic_size=True),
                tf.zeros([], kinds.stops.dtype),
                tf.zeros(kinds.norms.shape, kinds.norms.dtype),
            ),
            parallel_iterations=1,
        )
        return losses.stack(), tokens.stack(), stops, norms

    def _keep_carried(self, carried: list[tf.Tensor]) -> None:
        """Keeps what the rows of the global batch carry on to the next step, if they do."""
        if self._task.carried is not None:
            (value,) = carried
            self._task.carried.assign(value)

    def _in_global_batch(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns this shard's rows in their places, else 0; the sum over shards has all rows."""
        assert self._task.carried is not None  # only then rows carry anything
        shape = self._task.carried.shape
        start, stop = self._shard_range(shape[0])
        return tf.ensure_shape(tf.pad(rows, [[start, shape[0] - stop], [0, 0]]), shape)

    def _shard_range(self, num_rows: int) -> tuple[int | tf.Tensor, int | tf.Tensor]:
        """Returns this shard's slice [start, stop) of `num_rows` rows."""
        # As `data_pipelines.batches.batch_plan.shard_rows`, for a shard that may be a tensor.
        shard, shards = self._distributor.shard(), self._distributor.num_shards
        return num_rows * shard // shards, num_rows * (shard + 1) // shards


def _whole_and_row_bytes(tensor: tf.Variable) -> tuple[int, int]:
    """Returns the bytes of a gradient of `tensor`, and those of one of its rows and its index."""
    size = tensor.dtype.size
    return size * math.prod(tensor.shape), size * (math.prod(tensor.shape[1:]) + 1)


def _tokens_read(rows: Batch, dtype: tf.DType) -> tf.Tensor:
    """Returns the number of tokens in the rows, without filler rows."""
    return tf.reduce_sum(tf.cast(rows["lengths"] * tf.cast(rows["weights"] > 0, tf.int32), dtype))
