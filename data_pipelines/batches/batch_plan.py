"""Which example is in which global batch: a pure function of seed, epoch, lengths and batch size.

A position in training is one integer, the step: nothing else needs saving to resume. Orders are
keyed permutations, so that any step can be had without those before it.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_pipelines.errors import raise_if
from data_pipelines.permutation import Permutation
from data_pipelines.store.split_view import BLOCK_DOCUMENTS, block_sums, chunks

EXAMPLES_KEY = 2
BATCHES_KEY = 3


class Examples(Protocol):
    """What a plan is made of; `data_pipelines.store.split_view.SplitView` is one."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the tokens of examples, at least 1 each: int64 [n]."""


class _Epochs:
    """Steps counted across epochs of `_steps` global batches each."""

    _steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches an epoch; the same in each."""
        return self._steps

    def epoch_of(self, step: int) -> int:
        """Returns the epoch, from 0, that global step `step`, from 0, belongs to."""
        return step // self._steps


class BatchPlan(_Epochs):
    """Cuts each epoch's examples into global batches of similar lengths.

    Every example is in exactly one batch of an epoch. The content of a batch does not depend on
    the number of workers. Memory is that of two windows, whatever the number of examples.

    An epoch's shuffled examples are cut into windows of about `bucket_batches` batches; a window is
    sorted by length and cut into batches, and these are shuffled inside their window. With another
    plan `beside`, a window's batches are instead in the order of that plan's lengths in the same
    steps, so that two batches that are joined need little padding.

    Args:
        examples: what the batches are made of.
        max_tokens: training sees the last `max_tokens` tokens of a longer example.
        global_batch: examples a step, over all workers; all batches but one of an epoch have so
            many. None where `tokens_per_batch` is given.
        tokens_per_batch: tokens a step, over all workers, padding not counted: batches have varying
            numbers of examples and about this many tokens. It is a mean, not a limit: on reviews
            the largest batch is a few percent above it.
        seed: for the shuffling; not negative.
        shuffle: False keeps the order of the windows, the same in every epoch, and begins each
            with its shortest examples: for evaluation.
        bucket_batches: more means less padding, and batches that are less random.
        beside: the plan of what is read in the same steps; None: nothing is.

    Raises:
        InputError: there are no examples, or an argument is out of range.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        max_tokens: int,
        seed: int,
        global_batch: int | None = None,
        tokens_per_batch: int | None = None,
        shuffle: bool = True,
        bucket_batches: int = 50,
        beside: "BatchPlan | None" = None,
    ) -> None:
        if (global_batch is None) == (tokens_per_batch is None):
            raise ValueError("give either global_batch or tokens_per_batch")
        faults = _common_faults(examples, max_tokens, seed)
        if global_batch is not None and global_batch < 1:
            faults.append(f"a global batch of {global_batch} examples: it must be at least 1")
        if tokens_per_batch is not None and tokens_per_batch < max_tokens:
            faults.append(
                f"a batch of {tokens_per_batch} tokens cannot hold an example of "
                f"max_tokens={max_tokens}"
            )
        if bucket_batches < 1:
            faults.append(f"bucket_batches={bucket_batches} must be at least 1")
        raise_if(faults)
        self.num_examples = len(examples)
        self.max_tokens = max_tokens
        self._examples = examples
        self._global_batch = global_batch
        self._seed = seed
        self._shuffle = shuffle
        self._beside = beside
        if global_batch is not None:
            self._steps = -(-self.num_examples // global_batch)
        elif tokens_per_batch is not None:
            tokens = sum(
                int(np.minimum(examples.lengths_of(chunk), max_tokens).sum())
                for chunk in chunks(len(examples))
            )
            self._steps = -(-tokens // tokens_per_batch)
        self._num_windows = -(-self._steps // bucket_batches)
        self._windows = _Recent(self._make_window)
        self._orders = _Recent(self._make_order)

    @property
    def rows_vary(self) -> bool:
        """Whether batches have different numbers of examples, beside an epoch's last one."""
        return self._global_batch is None

    def indices(self, step: int) -> np.ndarray:
        """Returns the examples of global batch `step`: int64 [n], read-only.

        Args:
            step: counts from 0 across epochs. Any step costs one window, the others of the same
                window then nothing.

        Raises:
            ValueError: the step is negative.
        """
        return self._batch(step)[0]

    def lengths(self, step: int) -> np.ndarray:
        """Returns the tokens that are read of these examples, in their order: int64 [n].

        Raises:
            ValueError: the step is negative.
        """
        return self._batch(step)[1]

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, batch = divmod(step, self._steps)
        window = ((batch + 1) * self._num_windows - 1) // self._steps
        batches = self._windows((epoch, window))
        return batches[batch - shard_rows(self._steps, window, self._num_windows)[0]]

    def _make_order(self, epoch: int) -> Permutation:
        return Permutation(self.num_examples, (self._seed, EXAMPLES_KEY, epoch))

    def _make_window(self, key: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns examples and lengths of a window's batches, in the order of reading."""
        epoch, window = key
        first, stop = shard_rows(self._steps, window, self._num_windows)
        examples = np.arange(self._first_example(first), self._first_example(stop))
        if self._shuffle:
            examples = self._orders(epoch)(examples)
        lengths = np.minimum(self._examples.lengths_of(examples), self.max_tokens)
        by_length = np.argsort(lengths, kind="stable")
        order, lengths = examples[by_length], lengths[by_length]
        order.flags.writeable = lengths.flags.writeable = False
        cuts = self._cuts(lengths, stop - first)
        batches = list(zip(np.split(order, cuts), np.split(lengths, cuts), strict=True))
        if not self._shuffle:
            return batches
        if self._beside is not None:
            steps = range(epoch * self._steps + first, epoch * self._steps + stop)
            longest = [self._beside.lengths(step).max() for step in steps]
            return [batches[place] for place in np.argsort(np.argsort(longest, kind="stable"))]
        places = Permutation(len(batches), (self._seed, BATCHES_KEY, epoch, window))
        return [batches[place] for place in places(np.arange(len(batches)))]

    def _first_example(self, batch: int) -> int:
        """Returns the place in the epoch's order where the examples of batch `batch` begin."""
        if self._global_batch is not None:
            return min(batch * self._global_batch, self.num_examples)
        return self.num_examples * batch // self._steps

    def _cuts(self, lengths: np.ndarray, num_batches: int) -> np.ndarray:
        """Returns where a window, its lengths in order, is cut: int64 [num_batches - 1]."""
        number = np.arange(1, num_batches)
        if self._global_batch is not None:
            return number * self._global_batch
        ends = np.cumsum(lengths)
        cuts = np.searchsorted(ends, ends[-1] * number / num_batches, side="right")
        # At least one example for each batch: one may be longer than its window's share.
        cuts = np.maximum.accumulate(np.maximum(cuts - number, 0)) + number
        return np.minimum(cuts, len(lengths) - num_batches + number)


class Parts(NamedTuple):
    """Parts of examples that follow one another in rows; all int64 [parts]."""

    row: np.ndarray  # the row that the part is in, not falling
    example: np.ndarray  # which it is of
    start: np.ndarray  # its first token, counted from the example's start
    stop: np.ndarray  # the token to stop before


class PackedPlan(_Epochs):
    """Joins each epoch's shuffled examples into one stream of tokens and cuts it into rows.

    Rows have `max_tokens` tokens and no padding, but for the end of an epoch: an example may begin
    in one row and end in the next. Every token is in exactly one row of an epoch. The content of a
    row does not depend on the number of workers. Memory: a quarter of a byte an example; an epoch
    begins with one pass over the lengths of all of them.

    Args:
        examples: what the rows are made of.
        max_tokens: tokens a row.
        global_batch: rows a step, over all workers.
        seed: for the shuffling; not negative.
        carried: False gives rows in the order of the stream. True cuts the stream into
            `global_batch` streams of equal length, one for each row of a batch, and row r of a step
            continues row r of the step before: for truncated backpropagation with carried state.

    Raises:
        InputError: there are no examples, or an argument is out of range.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        max_tokens: int,
        seed: int,
        global_batch: int,
        carried: bool = False,
    ) -> None:
        faults = _common_faults(examples, max_tokens, seed)
        if global_batch < 1:
            faults.append(f"a global batch of {global_batch} rows: it must be at least 1")
        raise_if(faults)
        self.num_examples = len(examples)
        self.max_tokens = max_tokens
        self.carried = carried
        self._examples = examples
        self._global_batch = global_batch
        self._seed = seed
        self._epochs = _Recent(self._make_epoch)
        tokens = (int(examples.lengths_of(chunk).sum()) for chunk in chunks(len(examples)))
        self._num_tokens = sum(tokens)
        self._steps = -(-self._num_tokens // (global_batch * max_tokens))

    def continues(self, step: int) -> bool:
        """Returns whether the rows of `step` go on where those of the step before ended."""
        return self.carried and step % self._steps > 0

    def ranges(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns where rows start and stop in the epoch's stream: int64 [rows] each.

        The last batch of an epoch has fewer rows, or with `carried` shorter ones, which may be
        empty.

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        batch, rows = step % self._steps, np.arange(self._global_batch)
        if self.carried:
            starts = self._num_tokens * rows // self._global_batch + batch * self.max_tokens
            ends = self._num_tokens * (rows + 1) // self._global_batch
        else:
            starts = (batch * self._global_batch + rows) * self.max_tokens
            starts = starts[starts < self._num_tokens]
            ends = np.full(len(starts), self._num_tokens)
        return starts, np.minimum(starts + self.max_tokens, ends)

    def parts(self, epoch: int, starts: np.ndarray, stops: np.ndarray) -> Parts:
        """Returns what lies in ranges of an epoch's stream, one row a range.

        Args:
            epoch: from 0.
            starts: int64 [rows], as `ranges` gives them.
            stops: int64 [rows].
        """
        order, before = self._epochs(epoch)
        first = np.searchsorted(before, starts, side="right") - 1
        counts = np.where(stops > starts, np.searchsorted(before, stops, side="left") - first, 0)
        row = np.repeat(np.arange(len(starts)), counts)
        block = np.arange(len(row)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        blocks, block_of = np.unique(block, return_inverse=True)
        places = blocks[:, None] * BLOCK_DOCUMENTS + np.arange(BLOCK_DOCUMENTS)
        inside = places < self.num_examples
        examples = order(np.minimum(places, self.num_examples - 1).ravel())
        lengths = self._examples.lengths_of(examples).reshape(places.shape) * inside
        examples = examples.reshape(places.shape)[block_of]
        # Where examples lie in the stream: [blocks of rows, BLOCK_DOCUMENTS]
        ends = (before[blocks, None] + np.cumsum(lengths, axis=1))[block_of]
        begins = ends - lengths[block_of]
        part_starts = np.maximum(begins, starts[row, None])
        part_stops = np.minimum(ends, stops[row, None])
        kept = part_starts < part_stops
        return Parts(
            np.broadcast_to(row[:, None], kept.shape)[kept],
            examples[kept],
            (part_starts - begins)[kept],
            (part_stops - begins)[kept],
        )

    def _make_epoch(self, epoch: int) -> tuple[Permutation, np.ndarray]:
        """Returns an epoch's order, and the tokens before each block: int64 [blocks + 1]."""
        order = Permutation(self.num_examples, (self._seed, EXAMPLES_KEY, epoch))
        sums = [
            block_sums(self._examples.lengths_of(order(chunk)))
            for chunk in chunks(self.num_examples)
        ]
        return order, np.concatenate([[0], *sums]).cumsum()


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


class _Recent:
    """Remembers the last two results of a function, because parallel readers straddle an end."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._results: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, key: Hashable) -> Any:
        with self._lock:
            if key not in self._results:
                for old in list(self._results)[:-1]:
                    del self._results[old]
                self._results[key] = self._function(key)
            return self._results[key]


def _common_faults(examples: Examples, max_tokens: int, seed: int) -> list[str]:
    faults = []
    if len(examples) == 0:
        faults.append("there are no examples to make batches of: the split is empty")
    if max_tokens < 1:
        faults.append(f"max_tokens={max_tokens} must be at least 1")
    if seed < 0:
        faults.append(f"--seed={seed} must not be negative")
    return faults
