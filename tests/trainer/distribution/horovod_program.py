"""What each worker of test_horovod.py runs: every collective once, results as JSON by rank."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from trainer.config import StageConfig  # noqa: E402
from trainer.distribution import cluster as clusters  # noqa: E402
from trainer.distribution.make import make_distributor  # noqa: E402
from trainer.training.optimizer import KINDS, Optimizer  # noqa: E402

OPTIMIZERS = tuple(KINDS)
INPUTS = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
TARGETS = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)


def reduced(distributor) -> dict:
    rank = distributor.rank

    def step() -> list[tf.Tensor]:
        return distributor.all_reduce_sum(
            [
                tf.fill([2, 3], float(rank + 1)),
                tf.constant(2.0**-40 + rank, tf.float64),  # float32 would lose it
                tf.constant(float(10**rank)),
                tf.zeros([0, 4]),
                tf.constant([rank + 0.5], tf.bfloat16),
                tf.constant([rank + 0.5], tf.float16),
            ]
        )

    results = tf.function(lambda: distributor.run(step))()
    return {
        "values": [np.asarray(tensor, np.float64).tolist() for tensor in results],
        "dtypes": [tensor.dtype.name for tensor in results],
        "shapes": [tensor.shape.as_list() for tensor in results],
    }


def trained(distributor, name: str, rows: slice) -> list[list[float]]:
    """Returns the kernel after some steps on `rows` in each process."""
    with distributor.scope():
        layer = keras.layers.Dense(2, use_bias=False, kernel_initializer="ones")
        layer.build((None, 4))
    stage = StageConfig(steps=5, learning_rate=0.05)
    optimizer = Optimizer(name, stage, {"kernel": layer.kernel}, distributor)
    inputs, targets = tf.constant(INPUTS[rows]), tf.constant(TARGETS[rows])

    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(layer(inputs) - targets)) / len(INPUTS)
        gradients = tape.gradient(loss, [layer.kernel.value])
        optimizer.apply(distributor.all_reduce_sum(gradients))

    run = tf.function(lambda: distributor.run(step))
    for _ in range(5):
        run()
    return layer.kernel.numpy().tolist()


def outside_of_a_step(distributor) -> dict:
    rank = distributor.rank
    arrays = {"a": np.arange(5, dtype=np.float32), "b": np.array([[2**40 + 1]])}
    return {
        "sums": [
            array.tolist()
            for array in distributor.sum_over_processes(
                [np.full((2, 2), rank, np.float32), np.array(2.0**-40 + rank), np.float32([1])]
            )
        ],
        "objects": distributor.gather_objects({"rank": rank, "é": [rank] * rank}),
        "arrays": {
            name: [str(array.dtype), array.tolist()]
            for name, array in distributor.broadcast_arrays(arrays if rank == 0 else None).items()
        },
    }


def main(folder: Path) -> None:
    cluster = clusters.resolve(os.environ)
    distributor = make_distributor("auto", cluster, 60.0)
    shares = np.array_split(np.arange(len(INPUTS)), distributor.size)
    share = shares[distributor.rank]
    result = {
        "kind": type(distributor).__name__,
        "shard": distributor.local_shard(),
        "shards": distributor.num_shards,
        "reduced": reduced(distributor),
        "outside": outside_of_a_step(distributor),
        "trained": {
            name: trained(distributor, name, slice(share[0], share[-1] + 1)) for name in OPTIMIZERS
        },
    }
    distributor.barrier()
    (folder / f"{distributor.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
