"""Runs a function of a batch on every shard, over many batches."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from trainer.distribution.distributor import Distributor
from trainer.distribution.preemption import Preempted, StopRequest

PER_ROW = (*("tokens", "lengths", "labels", "weights", "contexts", "carries"), "global_counts")


def local_rows(distributor: Distributor, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns, inside a step, this shard's rows of the process's batch."""
    rows = {name: batch[name] for name in PER_ROW if name in batch}
    if distributor.num_local_shards == 1:
        return rows
    shard = distributor.local_shard()
    start, stop = batch["row_starts"][shard], batch["row_starts"][shard + 1]
    return {name: values[start:stop] for name, values in rows.items()}


def sum_over_batches(
    distributor: Distributor,
    sums: Callable[[dict[str, tf.Tensor]], Sequence[tf.Tensor]],
    batches: tf.data.Dataset,
    stop_request: StopRequest | None = None,
) -> Callable[[], list[np.ndarray]]:
    """Returns a function that sums the tensors of `sums` over all shards and batches.

    Calling it is a collective: every process calls it, with its slices of the same global batches.
    It is traced once.

    Args:
        sums: Maps rows (tokens, lengths, labels, weights) to tensors to sum; rows of weight 0 must
            add nothing.
        stop_request: This process's. Once any process has received one, the function raises
            Preempted in all of them, after the same batch.
    """

    def step(batch: dict[str, tf.Tensor], stop: tf.Tensor) -> list[tf.Tensor]:
        return distributor.all_reduce_sum([stop, *sums(local_rows(distributor, batch))])

    results = _batch_by_batch(distributor, step, batches, stop_request)

    def total() -> list[np.ndarray]:
        # Float64, so that sums over many batches stay exact.
        parts = [[tensor.numpy().astype(np.float64) for tensor in summed] for summed in results()]
        return [np.sum(column, axis=0) for column in zip(*parts, strict=True)]

    return total


def gather_rows(
    distributor: Distributor,
    columns: Callable[[dict[str, tf.Tensor]], tf.Tensor],
    batches: tf.data.Dataset,
    stop_request: StopRequest | None = None,
) -> np.ndarray:
    """Returns `columns` of the rows of all shards, without filler: [rows, width]. A collective.

    The rows are in the order of the global batches, for any number of workers.

    Args:
        columns: Maps rows (tokens, lengths, labels, weights) to [rows, width].
        stop_request: As in `sum_over_batches`.
    """

    def step(batch: dict[str, tf.Tensor], stop: tf.Tensor) -> list[tf.Tensor]:
        rows = local_rows(distributor, batch)
        found = tf.IndexedSlices(columns(rows), tf.cast(rows["weights"], tf.int32))
        stops, counts = distributor.all_reduce_sum(
            [stop, distributor.row_counts([found], stop.dtype)]
        )
        (gathered,) = distributor.all_gather_rows([found], counts)
        return [stops, gathered.values, gathered.indices]

    results = _batch_by_batch(distributor, step, batches, stop_request)
    return np.concatenate([values.numpy()[real.numpy() > 0] for values, real in results()])


def _batch_by_batch(
    distributor: Distributor,
    step: Callable[[dict[str, tf.Tensor], tf.Tensor], list[tf.Tensor]],
    batches: tf.data.Dataset,
    stop_request: StopRequest | None,
) -> Callable[[], Iterator[list[tf.Tensor]]]:
    """Returns a function that yields, for each batch, the tensors of `step` after the first.

    Args:
        step: Maps (batch, 1 if this process is to stop) to the number of processes to stop, and
            further tensors.
    """

    @tf.function(
        input_signature=[batches.element_spec, tf.TensorSpec([], tf.float32)], autograph=False
    )
    def run(batch: dict[str, tf.Tensor], stop: tf.Tensor) -> list[tf.Tensor]:
        return distributor.run(step, batch, stop)

    def results() -> Iterator[list[tf.Tensor]]:
        for batch in batches:
            asked = stop_request is not None and stop_request.received
            stops, *found = run(batch, tf.constant(float(asked)))
            if stops.numpy() > 0:
                raise Preempted("stopped by TERM during an evaluation")
            yield found

    return results
