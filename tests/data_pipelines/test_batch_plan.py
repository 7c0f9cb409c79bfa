import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.batch_plan import BatchPlan, shard_rows
from data_pipelines.errors import InputError

lengths_lists = st.lists(st.integers(1, 400), min_size=1, max_size=200).map(np.array)
plans = st.builds(
    BatchPlan,
    lengths_lists,
    st.integers(1, 40),
    st.integers(0, 2**40),
    st.booleans(),
    st.integers(1, 4),
)


@settings(deadline=None)
@given(plans, st.integers(0, 3))
def test_every_example_exactly_once_an_epoch(plan: BatchPlan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    batches = [plan.indices(first + i) for i in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(plan.num_examples))
    assert sum(len(b) < plan.global_batch for b in batches) <= 1
    assert all(0 < len(b) <= plan.global_batch and b.dtype == np.int64 for b in batches)
    assert {plan.epoch_of(first), plan.epoch_of(first + plan.steps_per_epoch - 1)} == {epoch}


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 40), st.integers(0, 2**40), st.booleans(), st.data())
def test_resuming_anywhere_continues_exactly(
    lengths: np.ndarray, batch: int, seed: int, shuffle: bool, data: st.DataObject
) -> None:
    one = BatchPlan(lengths, batch, seed, shuffle, bucket_batches=2)
    steps = 3 * one.steps_per_epoch
    run = [one.indices(step).tolist() for step in range(steps)]
    start = data.draw(st.integers(0, steps - 1))
    other = BatchPlan(lengths.copy(), batch, seed, shuffle, bucket_batches=2)
    assert [other.indices(step).tolist() for step in range(start, steps)] == run[start:]
    # Going back is as exact as going on.
    assert one.indices(0).tolist() == run[0]


@settings(deadline=None)
@given(plans, st.integers(1, 60))
def test_shards_partition_every_batch(plan: BatchPlan, num_shards: int) -> None:
    for step in range(plan.steps_per_epoch):
        rows = len(plan.indices(step))
        slices = [shard_rows(rows, shard, num_shards) for shard in range(num_shards)]
        assert slices[0][0] == 0 and slices[-1][1] == rows
        assert all(a[1] == b[0] for a, b in zip(slices, slices[1:], strict=False))
        sizes = [stop - start for start, stop in slices]
        assert min(sizes) >= 0 and max(sizes) - min(sizes) <= 1


def test_the_order_is_pinned() -> None:
    # A change here changes what every resumed run sees.
    plan = BatchPlan(np.arange(10), 4, seed=7, bucket_batches=2)
    assert [plan.indices(step).tolist() for step in range(6)] == [
        [7, 9],
        [4, 5, 6, 8],
        [0, 1, 2, 3],
        [0, 5],
        [1, 2, 3, 4],
        [6, 7, 8, 9],
    ]


def test_the_order_does_not_depend_on_the_process() -> None:
    program = (
        "import numpy as np; from data_pipelines.batch_plan import BatchPlan;"
        "print(BatchPlan(np.arange(999) % 37, 16, 5).indices(70).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    here = BatchPlan(np.arange(999) % 37, 16, 5).indices(70).tolist()
    assert result.stdout.strip() == str(here)


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.full(500, 9)
    plan = BatchPlan(lengths, 50, seed=1)
    epochs = [plan.indices(10 * epoch).tolist() for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != BatchPlan(lengths, 50, seed=2).indices(0).tolist()


def test_batches_of_an_epoch_are_not_in_order_of_length() -> None:
    plan = BatchPlan(np.arange(1, 1001), 10, seed=3)
    longest = [plan.indices(step).max() for step in range(50)]
    assert abs(np.corrcoef(longest, np.arange(50))[0, 1]) < 0.5


def test_without_shuffling_the_order_is_by_length_and_stable() -> None:
    plan = BatchPlan(np.array([3, 1, 3, 2, 1]), 2, seed=0, shuffle=False)
    assert [plan.indices(step).tolist() for step in range(6)] == [[1, 4], [3, 0], [2]] * 2


@pytest.mark.parametrize("batch", [32, 128, 256])
def test_padding_waste_on_review_lengths(batch: int) -> None:
    # Log-normal with the mean and deviation of IMDB's token counts, cut like training cuts them.
    draws = np.random.default_rng(0).lognormal(5.4, 0.65, 25_000)
    lengths = np.clip(draws, 10, 400).astype(np.int64)
    plan = BatchPlan(lengths, batch, seed=0)
    padded = 0
    for step in range(plan.steps_per_epoch):
        in_batch = lengths[plan.indices(step)]
        padded += len(in_batch) * -(-in_batch.max() // 8) * 8
    assert 1 - lengths.sum() / padded < 0.08


def test_the_plan_keeps_its_own_lengths_and_hands_out_read_only_batches() -> None:
    lengths = np.arange(1, 9)
    plan = BatchPlan(lengths, 4, seed=0, shuffle=False)
    lengths[:] = lengths[::-1].copy()
    assert plan.indices(0).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        plan.indices(0)[0] = 1


def test_threads_across_epochs_see_the_same_batches() -> None:
    lengths = np.arange(200) % 23
    steps = list(range(60)) * 4
    expected = [BatchPlan(lengths, 16, 0).indices(step).tolist() for step in steps]
    plan = BatchPlan(lengths, 16, 0)
    with ThreadPoolExecutor(8) as pool:
        assert [b.tolist() for b in pool.map(plan.indices, steps)] == expected


def test_bad_arguments_are_reported_together() -> None:
    with pytest.raises(InputError) as error:
        BatchPlan(np.array([]), 0, seed=-1)
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(ValueError, match="step -1"):
        BatchPlan(np.array([1]), 1, seed=0).indices(-1)
    with pytest.raises(ValueError, match="shard 2 of 2"):
        shard_rows(5, 2, 2)
