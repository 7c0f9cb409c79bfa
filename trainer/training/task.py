"""What the training loop is given, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import tensorflow as tf

from trainer.reporting.trackers import Tracker
from trainer.training.optimizer import Rate
from trainer.training.schedules import Schedule

# rows (tokens, lengths, labels, weights), step, slice -> the summed loss and its weight; the slice
# of the global batch is a number that random draws depend on. A task that carries state is given
# that of each row too, as `carried`, and returns it, as it is at the rows' ends, as a third tensor.
LossSum = Callable[[dict[str, tf.Tensor], tf.Tensor, int | tf.Tensor], tuple[tf.Tensor, ...]]


@dataclass(frozen=True)
class Task:
    """What a stage trains.

    Attributes:
      name: of the stage, for the status line.
      variables: those that are trained, by name.
      loss_sum: see LossSum; the weight is a number of tokens or of examples.
      evaluate: returns metrics by name; a collective.
      rates: learning rates of their own, by name of the variable.
      select_by: the metric, lower is better, whose best weights the stage ends with; "" keeps
        the last ones.
      ranked_by: the metric, lower is better, by which `keep_best` ranks where there is no
        `select_by`.
      carried: [global batch, numbers], the state in which each row of the step before ended, for
        batches whose rows continue those of the step before. None: nothing is carried.
      encoders: flag -> digest of the encoder bundles that it begins with; as `Checkpointer` wants
        them.
    """

    name: str
    variables: Mapping[str, keras.Variable]
    loss_sum: LossSum
    evaluate: Callable[[], dict[str, float]]
    rates: Mapping[str, Rate] = field(default_factory=dict)
    select_by: str = ""
    ranked_by: str = ""
    carried: keras.Variable | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, keras.Variable]:
        """Returns what a step changes, but for the optimizer's variables."""
        carried = {} if self.carried is None else {"carried": self.carried}
        return {**self.variables, **carried}


@dataclass(frozen=True)
class Settings:
    """How a stage trains; the flags of the same names describe the fields.

    Attributes:
      folder: that the stage writes.
      steps, schedule, evaluate_every_steps, ema: of the stage's own flags.
      replay_step: --step: the one that is run again; 0 to train.
      scale_loss: whether gradients need it, as those in float16 do.
    """

    folder: Path
    steps: int
    steps_per_epoch: int
    schedule: Schedule
    optimizer: str
    clip_norm: float
    accumulate_steps: int
    sparse_reduce: str
    compress: str
    check_divergence: bool
    log_every_steps: int
    checkpoint_every_steps: int
    evaluate_every_steps: int
    resume: bool
    keep_checkpoints: int = 2
    keep_best: int = 0
    checkpoint_errors: str = "stop"
    on_nonfinite: str = "stop"
    max_skipped_steps: int = 10
    stall_seconds: float = 0.0
    trackers: Sequence[Tracker] = ()
    ema: float = 0.0
    steps_per_call: int = 1
    profile_steps: tuple[int, int] = (0, 0)
    replay_step: int = 0
    scale_loss: bool = False


@dataclass(frozen=True)
class Result:
    """What a stage ended with.

    Attributes:
      metrics: of the last evaluation, or of the best one where the task selects by one.
      step: the step that they are of.
      seconds: spent, over all sittings of the run, evaluation and checkpoints included.
      tokens_per_second: of all workers together, in training steps only.
    """

    metrics: dict[str, float]
    step: int
    seconds: float
    tokens_per_second: float
