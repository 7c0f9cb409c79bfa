"""Which example is in which global batch: a pure function of seed, epoch, lengths and batch size.

A position in training is one integer, the step: nothing else needs saving to resume.
"""

import threading

import numpy as np

from data_pipelines.errors import InputError


class BatchPlan:
    """Cuts each epoch's examples into global batches of similar lengths.

    Every example is in exactly one batch of an epoch, and all batches but one have
    `global_batch` examples. The content of a batch does not depend on the number of workers.

    Args:
        lengths: integers [examples], the tokens of each example as training sees them
            (truncated, if it truncates).
        global_batch: examples a step, over all workers.
        seed: of the shuffling; not negative.
        shuffle: False gives every epoch the same order, shortest example first, for evaluation.
        bucket_batches: examples are sorted by length inside windows of this many batches. More
            means less padding, and batches that are less random.

    Raises:
        InputError: there are no examples, or an argument is out of range.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        global_batch: int,
        seed: int,
        shuffle: bool = True,
        bucket_batches: int = 50,
    ) -> None:
        faults = []
        if len(lengths) == 0:
            faults.append("there are no examples to make batches of: the split is empty")
        if global_batch < 1:
            faults.append(f"a global batch of {global_batch} examples: it must be at least 1")
        if seed < 0:
            faults.append(f"--seed={seed} must not be negative")
        if bucket_batches < 1:
            faults.append(f"bucket_batches={bucket_batches} must be at least 1")
        if faults:
            raise InputError("\n".join(faults))
        self._lengths = np.array(lengths, np.int64)
        self._global_batch = global_batch
        self._seed = seed
        self._shuffle = shuffle
        self._window = bucket_batches * global_batch
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def num_examples(self) -> int:
        """Examples an epoch."""
        return len(self._lengths)

    @property
    def global_batch(self) -> int:
        """Examples a step, but for the one smaller batch of an epoch."""
        return self._global_batch

    @property
    def steps_per_epoch(self) -> int:
        """Global batches an epoch, the smaller one included."""
        return -(-self.num_examples // self._global_batch)

    def epoch_of(self, step: int) -> int:
        """Returns the epoch, from 0, that global step `step`, from 0, belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """Returns the examples of global batch `step`: int64 [<= global_batch], read-only.

        Args:
            step: counts from 0 across epochs. Any step costs the same once its epoch is ordered.

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, batch = divmod(step, self.steps_per_epoch)
        order, starts = self._epoch(epoch)
        return order[starts[batch] : min(starts[batch] + self._global_batch, self.num_examples)]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an epoch's examples in order, and where in that order each batch starts."""
        if not self._shuffle:
            epoch = 0
        with self._lock:
            if epoch not in self._epochs:
                # Two epochs are kept, because parallel readers straddle the end of one.
                for old in sorted(self._epochs)[:-1]:
                    del self._epochs[old]
                self._epochs[epoch] = self._make_epoch(epoch)
            return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        starts = np.arange(0, self.num_examples, self._global_batch)
        if self._shuffle:
            bits = np.random.Philox(np.random.SeedSequence((self._seed, epoch)))
            # Sorted raw bits, because NumPy promises the same bits, but not the same
            # Generator.permutation, in its next version.
            order = np.argsort(bits.random_raw(self.num_examples), kind="stable")
            window = np.arange(self.num_examples) // self._window
            order = order[np.lexsort((self._lengths[order], window))]
            starts = starts[np.argsort(bits.random_raw(len(starts)), kind="stable")]
        else:
            order = np.argsort(self._lengths, kind="stable")
        order.flags.writeable = False
        return order, starts


def shard_rows(num_rows: int, shard: int, num_shards: int) -> tuple[int, int]:
    """Returns a worker's slice [start, stop) of a global batch of `num_rows` rows.

    The slices of shards 0 .. num_shards - 1 follow one another and differ by at most one row;
    with fewer rows than shards some are empty.

    Raises:
        ValueError: there is no such shard.
    """
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard {shard} of {num_shards} does not exist")
    return num_rows * shard // num_shards, num_rows * (shard + 1) // num_shards
