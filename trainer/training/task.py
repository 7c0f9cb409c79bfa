"""What the training loop is given, and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import keras
import tensorflow as tf

from trainer.config import StageConfig
from trainer.training.optimizer import Rate

# (rows, step, slice) -> summed loss, its weight. Rows are tokens, lengths, labels, weights. The
# number of the slice within the global batch seeds random draws. A task with `carried` state gets
# each row's state as rows["carried"] and returns the state at the rows' ends as a third tensor.
LossSum = Callable[[dict[str, tf.Tensor], tf.Tensor, int | tf.Tensor], tuple[tf.Tensor, ...]]


class Batches(Protocol):
    """The global batches of a stage; steps are counted from 0."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data."""

    def __call__(self, start_step: int, stop_step: int) -> tf.data.Dataset:
        """Returns this process's slices of the global batches of these steps."""

    def examples(self, step: int) -> list[int]:
        """Returns the numbers of the examples in the global batch of `step`."""

    def texts(self, step: int) -> dict[int, str]:
        """Returns the texts of these examples, by number."""


@dataclass(frozen=True)
class Task:
    """What a stage trains, and where.

    Attributes:
        name: "pretrain" or "finetune", for log lines and the names of flags.
        folder: Folder of checkpoints and metrics.jsonl.
        stage: The stage's flags.
        variables: Trained variables by name.
        loss_sum: See LossSum; the weight is a number of tokens or of examples.
        evaluate: Returns metrics by name; a collective.
        rates: Learning rates that differ from the stage's, by variable.
        select_by: The metric, lower is better, whose best weights the stage ends with; "" keeps
            the last weights.
        ranked_by: The metric, lower is better, by which --keep_best ranks without `select_by`.
        carried: [global batch, numbers], the state in which each row of the step before ended;
            None if rows do not continue those of the step before.
        inputs: Flag -> digest of the store and the encoder bundles that the stage reads, as
            `Checkpointer` takes them.
    """

    name: str
    folder: Path
    stage: StageConfig
    variables: Mapping[str, keras.Variable]
    loss_sum: LossSum
    evaluate: Callable[[], dict[str, float]]
    rates: Mapping[str, Rate] = field(default_factory=dict)
    select_by: str = ""
    ranked_by: str = ""
    carried: keras.Variable | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, keras.Variable]:
        """Everything that a step changes, without the optimizer's variables."""
        carried = {} if self.carried is None else {"carried": self.carried}
        return {**self.variables, **carried}

    def is_evaluated(self, step: int) -> bool:
        """Returns whether the state after `step` steps is evaluated."""
        every, last = self.stage.evaluate_every_steps, self.stage.steps
        return step > 0 and every > 0 and (step % every == 0 or step == last)


@dataclass(frozen=True)
class Result:
    """What a stage ended with."""

    metrics: dict[str, float]  # the last evaluation's, or the best one's if the task selects
    steps: int  # taken over all sittings
    step: int  # of these metrics
    seconds: float  # over all sittings, with evaluations and checkpoints
    tokens_per_second: float  # of all workers together, in training steps only
