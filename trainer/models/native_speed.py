"""Measures the compiled loops of an LSTM layer against TensorFlow's, on this processor.

python -m trainer.models.native_speed SET DTYPE     (as trainer.native does where it has no figure)

It counts the processor time of all threads: on a busy machine the wall time has called loops slower
that were faster.
"""

import statistics
import sys
import time
from collections.abc import Callable

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly(is_program=True)

import tensorflow as tf  # noqa: E402

from trainer import native  # noqa: E402
from trainer.models.lstm import WarmLSTM  # noqa: E402

SIZES = [(32, 40, 128, 256), (64, 10, 256, 512)]  # batch, steps, inputs, units
TURNS = 9


def step(
    sizes: tuple[int, int, int, int], instruction_set: str | None, dtype: str
) -> Callable[[], float]:
    """Returns what runs a forward and a backward pass, and returns its processor seconds."""
    batch, steps, inputs, units = sizes
    policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
    layer = WarmLSTM(units, return_sequences=True, dtype=policy)
    layer.build((batch, steps, inputs))
    sequences = tf.random.stateless_normal((batch, steps, inputs), (0, 0))
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function(autograph=False)
    def run() -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(sequences)
            loss = tf.reduce_sum(layer(sequences, training=True))
        gradients = tape.gradient(loss, [sequences, *weights])
        return tf.add_n([tf.reduce_sum(tf.cast(g, tf.float32)) for g in gradients])

    def timed() -> float:
        with native.using(instruction_set):
            began = time.process_time()
            run().numpy()
            return time.process_time() - began

    timed()  # traces
    return timed


def ratio(instruction_set: str, dtype: str) -> float:
    """Returns how many times faster a set's loops are than TensorFlow's, at the worse size.

    They take turns, and the median of the turns' ratios counts.
    """
    found = []
    for sizes in SIZES:
        compiled, plain = step(sizes, instruction_set, dtype), step(sizes, None, dtype)
        found.append(statistics.median(plain() / compiled() for _ in range(TURNS)))
    return min(found)


def main() -> None:
    """Prints the ratio of the instruction set and the dtype that the command line names."""
    print(round(ratio(*sys.argv[1:]), 3))


if __name__ == "__main__":
    main()
