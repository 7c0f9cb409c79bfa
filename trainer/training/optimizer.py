"""The optimizer of both stages: Keras's, with learning rates by variable and tables by rows."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.config import StageConfig
from trainer.distribution.distributor import Distributor
from trainer.distribution.variables import looked_up_by
from trainer.training.gradients import Gradient
from trainer.training.lazy_rows import Rule, Table, rule_of
from trainer.training.schedules import LearningRate

KINDS = {
    "adam": (keras.optimizers.Adam, {}),
    "adamw": (keras.optimizers.AdamW, {}),
    "nadam": (keras.optimizers.Nadam, {}),
    "sgd": (keras.optimizers.SGD, {"momentum": 0.9}),
}
if not hasattr(keras.optimizers.Optimizer, "_all_reduce_sum_gradients"):
    raise RuntimeError(
        f"Keras {keras.__version__} sums gradients over replicas in another method than "
        "_all_reduce_sum_gradients; see trainer/training/optimizer.py"
    )


class Rate(NamedTuple):
    """How the learning rate of a variable differs from the schedule's.

    Attributes:
        factor: On the learning rate (discriminative rates: Howard & Ruder 2018, section 3.2).
        frozen_steps: First steps with a rate of 0 (gradual unfreezing, section 3.3). Moments are
            gathered meanwhile, so that the first update is no larger than later ones.
    """

    factor: float
    frozen_steps: int


class _GivenSums(keras.optimizers.Optimizer):
    """Mixed into an optimizer of Keras: gradients are sums over replicas; `owner` updates.

    Under a distribution strategy Keras sums gradients in `apply`. The training step has summed
    them before, because clipping by the global norm needs the sum. A second sum multiplies them by
    the number of replicas, which Adam hides and SGD does not.
    """

    owner: "Optimizer"

    def _all_reduce_sum_gradients(
        self, pairs: Sequence[tuple[Gradient, tf.Variable]]
    ) -> list[tuple[Gradient, tf.Variable]]:
        return list(pairs)

    def update_step(
        self, gradient: Gradient, variable: tf.Variable, learning_rate: float | tf.Tensor
    ) -> None:
        self.owner.update(super().update_step, gradient, variable, learning_rate)


class Optimizer:
    """One of KINDS, built for `variables`.

    A dense optimizer passes over whole tables, such as embeddings, at every step. After
    `train_by_rows`, tables are trained by the few rows that have a gradient; see lazy_rows.py.

    Args:
        name: One of KINDS.
        stage: Learning rate, its schedule, and the number of steps.
        variables: By name; gradients come in their order.
        rates: Learning rates that differ from the schedule's, by variable.

    Raises:
        ValueError: There is no optimizer of this name.
    """

    def __init__(
        self,
        name: str,
        stage: StageConfig,
        variables: Mapping[str, keras.Variable],
        distributor: Distributor,
        rates: Mapping[str, Rate] | None = None,
    ):
        if name not in KINDS:
            raise ValueError(f"optimizer {name!r} is not one of {', '.join(KINDS)}")
        kind, options = KINDS[name]
        self._steps = stage.steps
        self._distributor = distributor
        self._variables = list(variables.values())
        rates = rates or {}
        self._rates = {i: rates[key] for i, key in enumerate(variables) if key in rates}
        self._by_rows: dict[int, Table] = {}
        self._dense: list[Table] = []
        with distributor.scope():
            self.keras = type(kind.__name__, (_GivenSums, kind), {})(LearningRate(stage), **options)
            self.keras.build(self._variables)
        self.keras.owner = self
        self._is_plain_adam = name in ("adam", "adamw")  # AdamW decays weights elsewhere

    def train_by_rows(self, is_table: Sequence[bool], by_rows: Sequence[bool]) -> None:
        """Makes tables of some variables, before the first step; adds to `variables`.

        Args:
            is_table: Which variables are tables, from `trace_gradients`.
            by_rows: Which tables are trained by rows. The others, whose gradients workers sum as
                dense ones, Keras trains; their rows are never behind.
        """
        # Both kinds count steps, so that a checkpoint fits any number of workers.
        with self._distributor.scope():
            tables = {
                i: Table(self._distributor, self.keras, i, self._variables[i], self._rule(i))
                for i, yes in enumerate(is_table)
                if yes
            }
        self._by_rows = {i: table for i, table in tables.items() if by_rows[i]}
        self._dense = [table for i, table in tables.items() if not by_rows[i]]
        self.keras.exclude_from_weight_decay([t.variable for t in self._by_rows.values()])

    def _rule(self, index: int) -> Rule:
        return rule_of(self.keras, self._steps, *self._rates.get(index, Rate(1.0, 0)))

    @property
    def variables(self) -> dict[str, keras.Variable]:
        """The optimizer's variables by number and kind, its count of steps included."""
        # Keras numbers the optimizers and layers that a process makes, so their names depend on
        # what else the process made: the stages of --stage=all, run alone, would differ.
        return {
            f"optimizer/{i:03d} {v.path.rsplit('_', 1)[-1].rsplit('/', 1)[-1]}": v
            for i, v in enumerate(self.keras.variables)
        }

    @property
    def steps_taken(self) -> tf.Variable:
        """The number of `apply` calls so far."""
        return self.keras.iterations.value

    def apply(self, gradients: Sequence[Gradient]) -> None:
        """Trains the variables, inside a step, with gradients summed over all shards."""
        self.keras.apply(gradients, self._variables)

    def update(
        self,
        dense_update: Callable[[Gradient, tf.Variable, float | tf.Tensor], None],
        gradient: Gradient,
        variable: tf.Variable,
        learning_rate: float | tf.Tensor,
    ) -> None:
        """Trains one variable: by rows, or by Keras's `dense_update` at the variable's rate."""
        index = self.keras._get_variable_index(variable)
        if index in self._by_rows:
            self._by_rows[index].train(gradient, variable)
            return
        if rate := self._rates.get(index):
            trained = tf.cast(self.keras.iterations >= rate.frozen_steps, variable.dtype)
            learning_rate = tf.cast(learning_rate, variable.dtype) * rate.factor * trained
        if self._is_plain_adam and variable.dtype == tf.float32:
            self._adam(index, tf.convert_to_tensor(gradient), variable, learning_rate)
        else:
            dense_update(gradient, variable, learning_rate)

    def _adam(
        self, index: int, gradient: tf.Tensor, variable: tf.Variable, rate: float | tf.Tensor
    ) -> None:
        """Keras's update of a variable in one pass over memory, where Keras's takes a dozen."""
        adam = self.keras
        step = tf.cast(adam.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=adam._momentums[index].value.handle,
            v=adam._velocities[index].value.handle,
            beta1_power=tf.pow(adam.beta_1, step),
            beta2_power=tf.pow(adam.beta_2, step),
            lr=tf.cast(rate, tf.float32),
            beta1=adam.beta_1,
            beta2=adam.beta_2,
            epsilon=adam.epsilon,
            grad=gradient,
        )

    def reading_rows(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which `lookup` brings rows of these tables up to date."""
        return looked_up_by([(t.variable.value, t.read) for t in self._by_rows.values()])

    def settle(self) -> None:
        """Brings all rows up to date, before the variables are read as they are."""
        for table in self._by_rows.values():
            table.settle()

    def before_save(self) -> None:
        """Sets the step counts of the tables that Keras trains."""
        for table in self._dense:
            step = tf.convert_to_tensor(self.keras.iterations)
            table.step_of_row.assign(tf.fill(table.step_of_row.shape, step))

    def after_restore(self) -> None:
        """Brings the tables that Keras trains up to date; they may be saved with rows behind."""
        for table in self._dense:
            table.settle()
