"""--precision=auto: bfloat16 where this machine is measured to be faster with it."""

import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from data_pipelines.errors import InputError
from trainer.distribution.distributor import Distributor
from trainer.models.lstm import WarmLSTM
from trainer.safe_files import replace_text

CHOICES = ("float32", "mixed_bfloat16")
STEPS = 60
REPEATS = 5
# By how much it must be faster: half precision is not for nothing.
MARGIN = 1.1


def choose(
    distributor: Distributor,
    folder: Path,
    sizes: tuple[int, int, int],
    resume: bool,
    log: Callable[[str], None],
) -> str:
    """Returns the faster one of CHOICES; a collective, outside of a step.

    The chief measures and remembers it in `folder`, so that a resumed run goes on as it began.

    Args:
      sizes: rows of a shard's batch, embedding_dim, units.
      resume: whether to take what `folder` remembers.

    Raises:
      InputError: in every worker: the choice cannot be read or remembered.
    """
    chosen, fault = "", ""
    if distributor.is_chief:
        path = folder / "precision.txt"
        try:
            chosen = _remembered(path) if resume else ""
            if not chosen:
                chosen = _faster(sizes, log)
                replace_text(path, chosen + "\n")
        except OSError as error:
            fault = (
                f"--precision=auto: the choice is kept in {path}: {error.strerror}: make room or "
                f"make it writable, or set --precision to one of {', '.join(CHOICES)}"
            )
    chosen, fault = distributor.gather_objects([chosen, fault])[0]
    if fault:
        raise InputError(fault)
    return chosen


def _remembered(path: Path) -> str:
    """Returns the choice that a run began with, "" if there is none."""
    said = path.read_bytes().strip() if path.exists() else b""
    return next((choice for choice in CHOICES if choice.encode() == said), "")


def _faster(sizes: tuple[int, int, int], log: Callable[[str], None]) -> str:
    """Returns the faster one of CHOICES, measured now."""
    seconds = measure(*sizes)
    ratio = seconds["float32"] / seconds["mixed_bfloat16"]
    chosen = CHOICES[ratio > MARGIN]
    log(f"precision: {chosen}; with bfloat16 the LSTM is {ratio:.2f} times as fast here")
    return chosen


def measure(rows: int, inputs: int, units: int) -> dict[str, float]:
    """Returns the seconds of a forward and a backward pass of STEPS steps, by precision."""
    steps = {precision: _step(precision, rows, inputs, units) for precision in CHOICES}
    times: dict[str, list[float]] = {precision: [] for precision in CHOICES}
    for _ in range(1 + REPEATS):  # in turn; the first traces
        for precision, step in steps.items():
            began = time.perf_counter()
            step().numpy()
            times[precision].append(time.perf_counter() - began)
    return {precision: min(values[1:]) for precision, values in times.items()}


def _step(precision: str, rows: int, inputs: int, units: int) -> Callable[[], tf.Tensor]:
    layer = WarmLSTM(units, return_sequences=True, dtype=precision)
    layer.build((rows, STEPS, inputs))
    sequences = tf.random.stateless_normal((rows, STEPS, inputs), (0, 0))
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function(autograph=False)
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(sequences, training=True))
        return tf.add_n([tf.reduce_sum(g) for g in tape.gradient(loss, weights)])

    return step
