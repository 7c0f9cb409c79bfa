"""What each worker of test_collectives.py runs; it writes what it found as JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from tests import loop_settings  # noqa: E402
from trainer.distribution import cluster as clusters  # noqa: E402
from trainer.distribution.distributor import Distributor  # noqa: E402
from trainer.distribution.make import make_distributor  # noqa: E402
from trainer.distribution.variables import digest  # noqa: E402
from trainer.training.optimizer import Optimizer  # noqa: E402
from trainer.training.task import Task  # noqa: E402
from trainer.training.train_step import TrainStep  # noqa: E402

# Steps with 12, 1 and 6 different tokens.
TOKENS = np.stack([np.arange(12), np.zeros(12), np.arange(12) // 2]).reshape(3, 3, 4)
BATCHES = loop_settings.TokenBatches(TOKENS)


def gathered(distributor: Distributor, *slices: tuple[np.ndarray, np.ndarray]) -> list:
    """Returns the values and indices of all workers, for each pair of this worker's."""

    def shard() -> list[tf.IndexedSlices]:
        mine = [tf.IndexedSlices(*map(tf.constant, pair)) for pair in slices]
        (counts,) = distributor.all_reduce_sum([distributor.row_counts(mine, tf.float32)])
        return distributor.all_gather_rows(mine, counts)

    found = tf.function(lambda: distributor.run(shard))()
    return [(each.values.numpy(), each.indices.numpy()) for each in found]


def uneven_rows(distributor: Distributor, *rows_by_rank: tuple[int, ...]) -> list:
    """Gathers a matrix and a vector: of each this worker has so many rows."""
    rank = distributor.rank
    first, second = (np.arange(rows[rank]) + 100 * rank for rows in rows_by_rank)
    matrix = np.full((len(first), 3), rank, np.float32)
    found = gathered(distributor, (matrix, first), (second.astype(np.float32), second))
    return [[values.tolist(), indices.tolist()] for values, indices in found]


def all_bits_arrive(distributor: Distributor, floating: type, integer: type) -> bool:
    """Sends every upper half of 32 bits with several lower ones: all signs, exponents and NaNs."""
    # Of 64 bits the same upper 16: sign, exponent and the bit of a quiet NaN.
    upper = np.arange(2**16, dtype=np.uint64) << (8 * np.dtype(integer).itemsize - 16)
    lower = np.array([0, 1, 0x7FFF, 0xFFFF], np.uint64)
    unsigned = np.dtype(integer).str.replace("i", "u")
    patterns = (upper[:, None] | lower).ravel().astype(unsigned)
    mine = np.roll(patterns, distributor.rank)
    ((values, indices),) = gathered(distributor, (mine.view(floating), mine[::-1].view(integer)))
    everyone = [np.roll(patterns, rank) for rank in range(distributor.size)]
    return (
        values.tobytes() == np.concatenate(everyone).tobytes()
        and indices.tobytes() == np.concatenate([each[::-1] for each in everyone]).tobytes()
    )


def sums_of_the_same_numbers(distributor: Distributor, times: int) -> list[str]:
    """Returns the distinct digests of `times` sums of vectors of several sizes."""
    random = np.random.default_rng(distributor.rank)
    mine = [random.normal(size=size).astype(np.float32) for size in (1, 5_003, 20_000)]

    @tf.function
    def summed() -> list[tf.Tensor]:
        return distributor.run(lambda: distributor.all_reduce_sum(list(map(tf.constant, mine))))

    return sorted(
        {digest({str(i): each.numpy() for i, each in enumerate(summed())}) for _ in range(times)}
    )


def collectives_of_a_step(distributor: Distributor, num_tables: int, **flags: Any) -> list[str]:
    """Returns the kinds of the collectives in a training step, after some steps."""
    keras.utils.clear_session()
    with distributor.scope():
        variables = {
            f"{kind}_{number}": keras.Variable(np.ones(shape, np.float32))
            for number in range(num_tables)
            for kind, shape in (("table", (30, number + 1)), ("dense", (number + 1,)))
        }

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        looked_up = [
            tf.gather(variables[f"table_{number}"].value, rows["tokens"])
            * variables[f"dense_{number}"].value
            for number in range(num_tables)
        ]
        return tf.add_n([tf.reduce_sum(each) for each in looked_up]), tf.constant(2.0)

    stage = loop_settings.stage()
    task = Task("pretrain", Path(), stage, variables, loss_sum, dict)
    optimizer = Optimizer("sgd", stage, variables, distributor)
    config = loop_settings.config(**flags)
    step = TrainStep(task, config, distributor, optimizer, BATCHES(0, 1))
    assert step(next(iter(BATCHES(0, 1))), tf.constant(0.0)).is_finite()
    if num_tables == 3:  # one time is enough
        assert len(step.several(iter(BATCHES(0, 3)), 3, tf.constant(0.0))) == 3
    graph = step.function.get_concrete_function().graph
    graphs = [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]
    kinds = [operation.type for each in graphs for operation in each.get_operations()]
    return sorted(kind for kind in kinds if kind.startswith(("Collective", "Horovod")))


def main(kind: str, folder: Path) -> None:
    distributor = make_distributor(kind, clusters.resolve(os.environ), 60.0)
    size = distributor.size
    result = {
        "uneven": uneven_rows(distributor, (2, 0, 3)[:size], (0, 1, 2)[:size]),
        "nothing": uneven_rows(distributor, (0, 0, 0), (0, 0, 0)),
        "float32": all_bits_arrive(distributor, np.float32, np.int32),
        "float64": all_bits_arrive(distributor, np.float64, np.int64),
        "sums": sums_of_the_same_numbers(distributor, 40),
        "rows": [
            collectives_of_a_step(distributor, tables, sparse_reduce="rows") for tables in (1, 3)
        ],
        "compressed": collectives_of_a_step(distributor, 2, sparse_reduce="rows", compress="fp16"),
        "dense": collectives_of_a_step(distributor, 2, sparse_reduce="dense"),
    }
    distributor.barrier()
    distributor.watchdog.leave()
    (folder / f"{distributor.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
