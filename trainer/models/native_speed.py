"""Measures the compiled loops of an LSTM layer against TensorFlow's, on this processor.

python -m trainer.models.native_speed     (part of python -m trainer.native.build)

What it finds is kept beside the build; `trainer.native` does not use loops that lose.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import tensorflow as tf  # noqa: E402

from trainer import native  # noqa: E402
from trainer.models.lstm import WarmLSTM  # noqa: E402

SIZES = [(32, 40, 128, 256), (64, 20, 256, 512)]  # batch, steps, inputs, units
TURNS = 11


def step(sizes: tuple[int, int, int, int], instruction_set: str | None) -> Callable[[], float]:
    """Returns what runs a forward and a backward pass, and returns the seconds that they took."""
    batch, steps, inputs, units = sizes
    layer = WarmLSTM(units, return_sequences=True)
    layer.build((batch, steps, inputs))
    sequences = tf.random.stateless_normal((batch, steps, inputs), (0, 0))
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function(autograph=False)
    def run() -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(sequences)
            loss = tf.reduce_sum(layer(sequences, training=True))
        return tf.add_n([tf.reduce_sum(g) for g in tape.gradient(loss, [sequences, *weights])])

    def timed() -> float:
        with native.using(instruction_set):
            began = time.perf_counter()
            run().numpy()
            return time.perf_counter() - began

    timed()  # traces
    return timed


def ratio(instruction_set: str) -> float:
    """Returns how many times faster a set's loops are than TensorFlow's, at the worse size.

    They take turns and the best times count: those that nothing else on the machine disturbed.
    """
    found = []
    for sizes in SIZES:
        compiled, plain = step(sizes, instruction_set), step(sizes, None)
        times = [(plain(), compiled()) for _ in range(TURNS)]
        of_plain, of_compiled = (min(column) for column in zip(*times, strict=True))
        found.append(of_plain / of_compiled)
    return min(found)


def main() -> None:
    """Measures the best instruction set, and keeps the ratio."""
    best = native.best_instruction_set()
    found = round(ratio(best), 3)
    path = native.measured_path()
    held = native.measured() | {f"{native.processor()} {best}": found}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(held, file, indent=1)
    os.replace(file.name, path)
    Path(path).chmod(0o644)
    print(native.hint())


if __name__ == "__main__":
    main()
