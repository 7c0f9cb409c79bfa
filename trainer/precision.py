"""--precision=auto: bfloat16 where this machine is measured to be faster with it."""

import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from trainer.distribution.distributor import Distributor, gather_objects, is_chief
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
    """
    chosen = None
    if is_chief(distributor):
        path = folder / "precision.txt"
        if resume and path.exists():
            chosen = path.read_text().strip()
        if chosen not in CHOICES:
            seconds = measure(*sizes)
            ratio = seconds["float32"] / seconds["mixed_bfloat16"]
            chosen = CHOICES[ratio > MARGIN]
            log(f"precision: {chosen}; with bfloat16 the LSTM is {ratio:.2f} times as fast here")
            replace_text(path, chosen + "\n")
    return gather_objects(distributor, chosen)[0]


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
