"""One training step, of all workers together: gradients, their sum, clipping, the optimizer.

N workers compute what one would: the loss and the gradients are sums over all tokens or
examples of the global batch, divided by their number after the reduction, and clipped by the
global norm after that.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.distribution.distributor import Distributor
from trainer.distribution.steps import local_rows
from trainer.training.gradients import Gradient, divided, loss_and_gradients
from trainer.training.lazy_rows import Rule, Tables, rule_of, trace_gradients
from trainer.training.loss_scale import LossScale
from trainer.training.optimizer import Rate
from trainer.training.reduction import choose_rows, reduce_gradients
from trainer.training.task import Settings, Task


class Outcome(NamedTuple):
    """What a step gives, of the global batch; the same in every worker.

    Attributes:
      loss: the mean, a scalar.
      tokens: read, a scalar.
      stops: how many shards were asked to stop, a scalar.
      norms: of each variable's gradient before clipping, [variables].
    """

    loss: tf.Tensor
    tokens: tf.Tensor
    stops: tf.Tensor
    norms: tf.Tensor

    def is_finite(self) -> bool:
        """Returns whether the loss and the gradients are finite."""
        return bool(np.isfinite(self.loss.numpy()) and np.isfinite(self.norms.numpy()).all())


# (batch, stop asked for here) -> outcome
TrainStep = Callable[[dict[str, tf.Tensor], tf.Tensor], Outcome]
# (iterator of batches, number of steps, stop asked for here) -> outcomes
SeveralSteps = Callable[[Iterator[dict[str, tf.Tensor]], int, tf.Tensor], list[Outcome]]
# Inside of a step: batch -> a shard's summed loss, its weight, its gradients, what its rows carry.
ShardGradients = Callable[
    [dict[str, tf.Tensor]], tuple[tf.Tensor, tf.Tensor, list[Gradient], list[tf.Tensor]]
]
# Inside of a step: (batch, stop) -> outcome, gradients, and carried rows of the global batch.
GlobalGradients = Callable[
    [dict[str, tf.Tensor], tf.Tensor], tuple[Outcome, list[Gradient], list[tf.Tensor]]
]


def make_train_step(
    task: Task,
    optimizer: keras.optimizers.Optimizer,
    distributor: Distributor,
    settings: Settings,
    batches: Callable[[int, int], tf.data.Dataset],
    loss_scale: LossScale | None = None,
) -> tuple[TrainStep, Tables]:
    """Returns (batch, stop asked for here) -> the step's outcome; and the tables that it trains.

    Where `settings.on_nonfinite` is "skip", a step that is not finite changes no variable. Its
    gradients then pass from one function to a second: Keras cannot apply them inside a tf.cond
    under a strategy. Where it is "stop" they are applied, and the variables no longer of use.
    With a loss scale, a step of which only the gradients are not finite is tried again.

    Args:
      optimizer: built for the task's variables; it has the tables' variables after this.
      batches: as in `train`.
    """
    first = batches(0, 1)  # what is measured on it must not depend on where the run resumes
    variables = list(task.variables.values())
    shard_gradients = _shard_gradients(task, distributor, settings, loss_scale)
    traced = trace_gradients(
        distributor, variables, lambda batch: shard_gradients(batch)[2], first.element_spec
    )
    sizes = [_whole_and_row_bytes(variable.value) for variable in variables]
    as_rows = choose_rows(
        distributor, settings.sparse_reduce, traced.is_sparse, traced.count_rows, first, sizes
    )
    one_shard = distributor.num_shards == 1
    by_rows = [
        is_table and (one_shard or r) for is_table, r in zip(traced.is_table, as_rows, strict=True)
    ]
    with distributor.scope():
        tables = Tables(
            distributor, optimizer, variables, traced.is_table, by_rows,
            _rules(task, optimizer, settings),
        )  # fmt: skip

    def sum_gradients(gradients: list[Gradient]) -> list[Gradient]:
        return reduce_gradients(distributor, gradients, as_rows, settings.compress, by_rows)

    global_gradients = _global_gradients(
        task, distributor, settings, loss_scale, tables, shard_gradients, sum_gradients
    )
    signature = [first.element_spec, tf.TensorSpec([], tf.float32)]
    if settings.on_nonfinite == "stop" and loss_scale is None:
        return _one_call(task, optimizer, distributor, global_gradients, signature), tables
    return _two_calls(task, optimizer, distributor, global_gradients, signature, loss_scale), tables


def _shard_gradients(
    task: Task, distributor: Distributor, settings: Settings, loss_scale: LossScale | None
) -> ShardGradients:
    """Returns batch -> a shard's summed loss, its weight, gradients, and what rows carry on."""

    def loss_sum(
        rows: dict[str, tf.Tensor], step: tf.Tensor, part: int | tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        loss, *others = task.loss_sum(rows, step, part)
        return (loss if loss_scale is None else loss * loss_scale.factor(), *others)

    def shard_gradients(
        batch: dict[str, tf.Tensor],
    ) -> tuple[tf.Tensor, tf.Tensor, list[Gradient], list[tf.Tensor]]:
        rows = local_rows(distributor, batch)
        if task.carried is not None:
            rows["carried"] = carried_rows(distributor, task.carried.value)
        return loss_and_gradients(
            lambda rows, part: loss_sum(rows, batch["step"], part),
            [variable.value for variable in task.variables.values()],
            rows,
            distributor.local_shard() + distributor.rank * distributor.num_local_shards,
            settings.accumulate_steps,
        )

    return shard_gradients


def _whole_and_row_bytes(tensor: tf.Variable) -> tuple[int, int]:
    """Returns the bytes of a gradient of `tensor`, and those of one of its rows."""
    size = tensor.dtype.size
    return size * math.prod(tensor.shape), size * math.prod(tensor.shape[1:])


def _rules(task: Task, optimizer: keras.optimizers.Optimizer, settings: Settings) -> list[Rule]:
    """Returns how each variable is trained; variables of one rate share one rule."""
    no_rate = Rate(1.0, 0)
    rules = {
        rate: rule_of(optimizer, settings.steps, *rate) for rate in {no_rate, *task.rates.values()}
    }
    return [rules[task.rates.get(name, no_rate)] for name in task.variables]


def _global_gradients(
    task: Task,
    distributor: Distributor,
    settings: Settings,
    loss_scale: LossScale | None,
    tables: Tables,
    shard_gradients: ShardGradients,
    sum_gradients: Callable[[list[Gradient]], list[Gradient]],
) -> GlobalGradients:
    """Returns (batch, stop) -> outcome, clipped gradients of the global batch, what is carried.

    It runs inside a step, on each shard; all but the gradients' way is the same in every one.

    Args:
      sum_gradients: each shard's gradients -> their sums over all shards.
    """

    def global_gradients(
        batch: dict[str, tf.Tensor], stop: tf.Tensor
    ) -> tuple[Outcome, list[Gradient], list[tf.Tensor]]:
        rows = local_rows(distributor, batch)
        with tables.read_up_to_date():
            loss, weight, gradients, carried = shard_gradients(batch)
        if task.carried is not None:
            shape = task.carried.shape
            carried = [in_global_batch(distributor, part, shape) for part in carried]
        tokens = _tokens_read(rows, weight.dtype)
        # Of their own, before the gradients: they are known before the backward pass begins.
        loss, weight, tokens, stop, *carried = distributor.all_reduce_sum(
            [loss, weight, tokens, tf.cast(stop, weight.dtype), *carried]
        )
        if loss_scale is not None:
            loss /= loss_scale.factor()
        divisor = weight if loss_scale is None else weight * loss_scale.factor()
        gradients = [divided(gradient, divisor) for gradient in gradients]
        with tf.name_scope("collective"):
            gradients = sum_gradients(gradients)
        # As tf.linalg.global_norm does, which keeps those of the variables to itself.
        halves = tf.stack(
            [tf.nn.l2_loss(g.values if isinstance(g, tf.IndexedSlices) else g) for g in gradients]
        )
        norm = tf.sqrt(2 * tf.reduce_sum(halves))
        gradients, _ = tf.clip_by_global_norm(gradients, settings.clip_norm, use_norm=norm)
        outcome = Outcome(loss / weight, tokens, stop, tf.sqrt(2 * halves))
        return outcome, gradients, carried

    return global_gradients


def _tokens_read(rows: dict[str, tf.Tensor], dtype: tf.DType) -> tf.Tensor:
    """Returns how many tokens the rows have, filler left out."""
    return tf.reduce_sum(tf.cast(rows["lengths"] * tf.cast(rows["weights"] > 0, tf.int32), dtype))


def _carry(task: Task, carried: list[tf.Tensor]) -> None:
    """Keeps what the rows of the global batch carry on to the next step, if they do."""
    if task.carried is not None:
        (value,) = carried
        task.carried.assign(value)


def _one_call(
    task: Task,
    optimizer: keras.optimizers.Optimizer,
    distributor: Distributor,
    global_gradients: GlobalGradients,
    signature: list[Any],
) -> TrainStep:
    """Returns the step as one tf.function, which applies whatever gradients there are."""

    def reduce_and_apply(
        batch: dict[str, tf.Tensor], stop: tf.Tensor
    ) -> tuple[Outcome, list[tf.Tensor]]:
        outcome, gradients, carried = global_gradients(batch, stop)
        with tf.name_scope("optimizer"):
            optimizer.apply(gradients, list(task.variables.values()))
        return outcome, carried

    def step_and_carry(batch: dict[str, tf.Tensor], stop: tf.Tensor) -> Outcome:
        outcome, carried = distributor.run(reduce_and_apply, batch, stop)
        _carry(task, carried)
        return outcome

    return tf.function(step_and_carry, input_signature=signature, autograph=False)


def _two_calls(
    task: Task,
    optimizer: keras.optimizers.Optimizer,
    distributor: Distributor,
    global_gradients: GlobalGradients,
    signature: list[Any],
    loss_scale: LossScale | None,
) -> TrainStep:
    """Returns the step as two tf.functions; the second applies gradients that are finite."""
    variables = list(task.variables.values())
    reduce = tf.function(
        lambda batch, stop: distributor.run(global_gradients, batch, stop),
        input_signature=signature,
        autograph=False,
    )
    # As they come out of a graph: a table's gradient has any number of rows, so one trace does.
    _, gradients, _ = reduce.get_concrete_function().structured_outputs
    apply = tf.function(
        lambda gradients: distributor.run(lambda g: optimizer.apply(g, variables), gradients),
        input_signature=[[tf.type_spec_from_value(gradient) for gradient in gradients]],
        autograph=False,
    )

    def train_step(batch: dict[str, tf.Tensor], stop: tf.Tensor) -> Outcome:
        outcome, gradients, carried = reduce(batch, stop)
        while loss_scale and np.isfinite(outcome.loss) and not outcome.is_finite():
            if not loss_scale.shrink():
                break
            outcome, gradients, carried = reduce(batch, stop)
        if outcome.is_finite():
            apply(gradients)
            _carry(task, carried)
            if loss_scale:
                loss_scale.grow()
        return outcome

    return train_step


def make_several_steps(
    train_step: tf.types.experimental.PolymorphicFunction,
) -> SeveralSteps:
    """Returns (iterator of batches, number of steps, stop asked for here) -> the steps' outcomes.

    All steps are one call, of which the host waits for the end. It ends at a step that is not
    finite, and there are fewer outcomes then; only the last one has its own norms.

    Args:
      train_step: a TrainStep that is one tf.function.
    """

    @tf.function(autograph=False)
    def run(
        iterator: Iterator[dict[str, tf.Tensor]], count: tf.Tensor, stop: tf.Tensor
    ) -> tuple[Any, ...]:
        kinds = train_step.get_concrete_function().structured_outputs

        def step(
            done: tf.Tensor, _: tf.Tensor, losses: Any, tokens: Any, *last: Any
        ) -> tuple[Any, ...]:
            outcome = train_step(next(iterator), stop)
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

    def several_steps(
        iterator: Iterator[dict[str, tf.Tensor]], count: int, stop: tf.Tensor
    ) -> list[Outcome]:
        losses, tokens, stops, norms = run(iterator, tf.constant(count), stop)
        done = len(losses)
        finite = tf.zeros_like(norms)
        return [
            Outcome(losses[i], tokens[i], stops, norms if i == done - 1 else finite)
            for i in range(done)
        ]

    return several_steps


def carried_rows(distributor: Distributor, carried: tf.Tensor) -> tf.Tensor:
    """Returns, inside a step, this shard's rows of what the global batch carries."""
    start, stop = shard_range(distributor, carried.shape[0])
    return carried[start:stop]


def in_global_batch(distributor: Distributor, rows: tf.Tensor, shape: tuple[int, int]) -> tf.Tensor:
    """Returns this shard's rows in their places, all else 0: the sum over shards has them all."""
    start, stop = shard_range(distributor, shape[0])
    return tf.ensure_shape(tf.pad(rows, [[start, shape[0] - stop], [0, 0]]), shape)


def shard_range(distributor: Distributor, num_rows: int) -> tuple[int | tf.Tensor, int | tf.Tensor]:
    """Returns, inside a step, this shard's slice [start, stop) of `num_rows` rows."""
    shard = distributor.local_shard() + distributor.rank * distributor.num_local_shards
    shards = distributor.num_shards
    # As `data_pipelines.batches.batch_plan.shard_rows`; the shard may be a tensor.
    return num_rows * shard // shards, num_rows * (shard + 1) // shards
