import itertools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan, shard_rows
from data_pipelines.errors import InputError

MAX_TOKENS = 400


class Lengths:
    """Examples that are nothing but lengths, and count how many are asked for."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.asked = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        self.asked += len(indices)
        return self.lengths[indices]


def make(lengths: np.ndarray, global_batch: int | None, **changes: object) -> BatchPlan:
    arguments = {"max_tokens": MAX_TOKENS, "seed": 0, **changes}
    return BatchPlan(Lengths(lengths), global_batch=global_batch, **arguments)


def review_lengths(documents: int = 25_000) -> np.ndarray:
    # Log-normal with the mean and deviation of IMDB's token counts.
    draws = np.random.default_rng(0).lognormal(5.4, 0.65, documents)
    return np.clip(draws, 10, 2500).astype(np.int64)


def waste(lengths: np.ndarray, plan: BatchPlan) -> float:
    """Returns the part of an epoch's tokens that is padding."""
    cut = np.minimum(lengths, plan.max_tokens)
    batches = [cut[plan.indices(step)] for step in range(plan.steps_per_epoch)]
    return 1 - cut.sum() / sum(len(batch) * -(-batch.max() // 8) * 8 for batch in batches)


lengths_lists = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=200)
sizes = st.one_of(
    st.builds(lambda n: {"global_batch": n, "tokens_per_batch": None}, st.integers(1, 40)),
    st.builds(
        lambda n: {"global_batch": None, "tokens_per_batch": n}, st.integers(MAX_TOKENS, 4000)
    ),
)
settings_of_plans = st.builds(
    lambda size, seed, shuffle, bucket: {
        **size,
        "seed": seed,
        "shuffle": shuffle,
        "bucket_batches": bucket,
    },
    sizes,
    st.integers(0, 2**40),
    st.booleans(),
    st.integers(1, 4),
)


@settings(deadline=None)
@given(lengths_lists, settings_of_plans, st.integers(0, 3))
def test_every_example_exactly_once_an_epoch(lengths: list, choice: dict, epoch: int) -> None:
    plan = make(lengths, **choice)
    first = epoch * plan.steps_per_epoch
    batches = [plan.indices(first + i) for i in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(plan.num_examples))
    assert all(len(b) > 0 and b.dtype == np.int64 for b in batches)
    assert {plan.epoch_of(first), plan.epoch_of(first + plan.steps_per_epoch - 1)} == {epoch}
    if choice["global_batch"]:
        assert max(map(len, batches)) <= choice["global_batch"]
        assert sum(len(b) < choice["global_batch"] for b in batches) <= 1


@settings(deadline=None)
@given(lengths_lists, settings_of_plans, st.data())
def test_resuming_anywhere_continues_exactly(
    lengths: list, choice: dict, data: st.DataObject
) -> None:
    one = make(lengths, **choice)
    steps = 3 * one.steps_per_epoch
    run = [one.indices(step).tolist() for step in range(steps)]
    start = data.draw(st.integers(0, steps - 1))
    other = make(lengths, **choice)
    assert [other.indices(step).tolist() for step in range(start, steps)] == run[start:]
    # Going back is as exact as going on.
    assert one.indices(0).tolist() == run[0]


@given(st.integers(0, 500), st.integers(1, 60))
def test_shards_partition_every_batch(rows: int, num_shards: int) -> None:
    slices = [shard_rows(rows, shard, num_shards) for shard in range(num_shards)]
    assert slices[0][0] == 0 and slices[-1][1] == rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))
    lengths = [stop - start for start, stop in slices]
    assert min(lengths) >= 0 and max(lengths) - min(lengths) <= 1


def test_the_order_is_pinned() -> None:
    # A change here changes what every resumed run sees.
    plan = make(np.arange(1, 11), 4, seed=7, bucket_batches=2)
    assert [plan.indices(step).tolist() for step in range(6)] == [
        [3, 4, 8, 9],
        [0, 1, 2, 5],
        [6, 7],
        [0, 1, 3, 5],
        [8, 9],
        [2, 4, 6, 7],
    ]


def test_the_order_does_not_depend_on_the_process() -> None:
    program = (
        "import numpy as np; from data_pipelines.batches.batch_plan import BatchPlan\n"
        "class Lengths:\n"
        "    def __len__(self): return 999\n"
        "    def lengths_of(self, indices): return indices % 37 + 1\n"
        "plan = BatchPlan(Lengths(), max_tokens=400, global_batch=16, seed=5)\n"
        "print(plan.indices(70).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    here = make(np.arange(999) % 37 + 1, 16, seed=5).indices(70).tolist()
    assert result.stdout.strip() == str(here)


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.full(500, 9)
    plan = make(lengths, 50, seed=1)
    epochs = [plan.indices(10 * epoch).tolist() for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != make(lengths, 50, seed=2).indices(0).tolist()


def test_batches_of_an_epoch_are_not_in_order_of_length() -> None:
    plan = make(np.arange(1, 401).repeat(5), 10, seed=3)
    longest = [plan.indices(step).max() for step in range(200)]
    assert abs(np.corrcoef(longest, np.arange(200))[0, 1]) < 0.2


def test_a_batch_has_examples_of_similar_lengths_from_all_over_the_corpus() -> None:
    lengths = review_lengths()
    plan = make(lengths, 64)
    batches = [plan.indices(step) for step in range(plan.steps_per_epoch)]
    assert np.median([np.ptp(np.minimum(lengths[batch], MAX_TOKENS)) for batch in batches]) < 15
    spread = np.mean([batch.std() for batch in batches]) / (25_000 / np.sqrt(12))
    assert 0.95 < spread < 1.05


def test_without_shuffling_each_window_is_by_length_and_stable() -> None:
    lengths = np.array([3, 1, 3, 2, 1])
    plan = make(lengths, 2, shuffle=False)
    assert [plan.indices(step).tolist() for step in range(6)] == [[1, 4], [3, 0], [2]] * 2
    plan = make(lengths, 2, shuffle=False, bucket_batches=1)
    assert [plan.indices(step).tolist() for step in range(3)] == [[1, 0], [3, 2], [4]]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch", [32, 64, 256])
def test_padding_waste_on_review_lengths(batch: int, shuffle: bool) -> None:
    assert waste(review_lengths(), make(review_lengths(), batch, shuffle=shuffle)) < 0.08


def test_batches_beside_others_are_of_similar_lengths_and_still_have_each_example_once() -> None:
    labelled, unlabelled = review_lengths(5_000), review_lengths(12_000)[::-1]
    others = make(labelled, 64)
    plans = {"beside": make(unlabelled, 64, beside=others), "alone": make(unlabelled, 64)}
    steps = range(plans["alone"].steps_per_epoch)  # of another length than those of `others`
    padded = {
        name: sum(128 * max(p.lengths(i).max(), others.lengths(i).max()) for i in steps)
        for name, p in plans.items()
    }
    real = sum(plans["beside"].lengths(i).sum() + others.lengths(i).sum() for i in steps)
    assert 1 - real / padded["beside"] < 0.06 < 0.2 < 1 - real / padded["alone"]
    for epoch in (0, 1):
        first = epoch * len(steps)
        found = np.concatenate([plans["beside"].indices(first + i) for i in steps])
        np.testing.assert_array_equal(np.sort(found), np.arange(len(unlabelled)))
    again = make(unlabelled, 64, beside=make(labelled, 64))  # from any step on
    for step in (len(steps) + 77, 5, len(steps) - 1):
        np.testing.assert_array_equal(again.indices(step), plans["beside"].indices(step))


def test_a_budget_of_tokens_is_kept_in_the_mean_and_nearly_in_each_batch() -> None:
    lengths = review_lengths()
    cut = np.minimum(lengths, MAX_TOKENS)
    plan = make(lengths, None, tokens_per_batch=16_000)
    assert plan.steps_per_epoch == -(-cut.sum() // 16_000)
    tokens = [cut[plan.indices(step)].sum() for step in range(plan.steps_per_epoch)]
    assert 15_900 < np.mean(tokens) <= 16_000
    assert max(tokens) < 1.06 * 16_000 and min(tokens) > 0.9 * 16_000
    assert waste(lengths, plan) < 0.08
    rows = [len(plan.indices(step)) for step in range(plan.steps_per_epoch)]
    assert max(rows) > 3 * min(rows)


def test_no_batch_is_empty_where_one_example_is_longer_than_its_windows_share() -> None:
    lengths = [1, 1, 400] + [400] * 17
    choice = {"tokens_per_batch": 400, "shuffle": False, "bucket_batches": 4}
    plan = make(lengths, None, **choice)
    assert [plan.indices(step).tolist() for step in range(4)] == [[0], [1], [2], [3]]


def test_any_step_costs_one_window() -> None:
    examples = Lengths(np.full(100_000, 7))
    plan = BatchPlan(examples, max_tokens=9, global_batch=10, seed=0, bucket_batches=20)
    assert examples.asked == 0
    plan.indices(123_456)
    assert examples.asked == 200


def test_batches_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make(np.arange(1, 9), 4).indices(0)[0] = 1


def test_threads_across_epochs_see_the_same_batches() -> None:
    lengths = np.arange(200) % 23 + 1
    steps = list(range(60)) * 4
    plan = make(lengths, 16, bucket_batches=3)
    expected = [make(lengths, 16, bucket_batches=3).indices(step).tolist() for step in steps]
    with ThreadPoolExecutor(8) as pool:
        assert [b.tolist() for b in pool.map(plan.indices, steps)] == expected


def stream_of(plan: PackedPlan, examples: Lengths, epoch: int) -> list[tuple[int, int]]:
    """Returns an epoch's stream as (example, token) pairs."""
    total = np.array([examples.lengths.sum()])
    parts = plan.parts(epoch, np.array([0]), total)
    rows = zip(parts.example, parts.start, parts.stop, strict=True)
    return [(int(e), token) for e, start, stop in rows for token in range(start, stop)]


def rows_of(plan: PackedPlan, step: int) -> list[list[tuple[int, int]]]:
    """Returns the rows of a step as lists of (example, token) pairs."""
    starts, stops = plan.ranges(step)
    parts = plan.parts(plan.epoch_of(step), starts, stops)
    rows: list[list[tuple[int, int]]] = [[] for _ in starts]
    for row, example, start, stop in zip(*parts, strict=True):
        rows[row] += [(int(example), token) for token in range(start, stop)]
    assert [len(row) for row in rows] == (stops - starts).tolist()
    return rows


CHOICE = {"max_tokens": 3, "global_batch": 4, "seed": 0}
packed_plans = st.builds(
    lambda lengths, **choice: (Lengths(lengths), choice),
    st.lists(st.integers(1, 60), min_size=1, max_size=120),
    max_tokens=st.integers(1, 40),
    global_batch=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    carried=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(packed_plans, st.integers(0, 2))
# More examples than a block holds; an epoch that ends with a row, not with a batch.
@hypothesis.example(
    (Lengths(1 + np.arange(100) % 7), {**CHOICE, "max_tokens": 30, "carried": True}), 1
)
@hypothesis.example(
    (Lengths(1 + np.arange(100) % 7), {**CHOICE, "max_tokens": 30, "carried": False}), 1
)
@hypothesis.example((Lengths([3, 3]), {**CHOICE, "carried": False}), 0)
def test_every_token_exactly_once_an_epoch_in_whole_examples(chosen: tuple, epoch: int) -> None:
    examples, choice = chosen
    plan = PackedPlan(examples, **choice)
    stream = stream_of(plan, examples, epoch)
    # Examples one after the other, each whole and in order, each once.
    order = [example for example, token in stream if token == 0]
    assert sorted(order) == list(range(len(examples)))
    assert stream == [(e, t) for e in order for t in range(examples.lengths[e])]
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    batches = [rows_of(plan, step) for step in steps]
    assert all(any(batch) for batch in batches)
    if choice["carried"]:
        # Row r of all batches, one after the other, is one stretch of the stream.
        streams = [sum((batch[r] for batch in batches), []) for r in range(choice["global_batch"])]
        assert sum(streams, []) == stream
        assert max(map(len, streams)) - min(map(len, streams)) <= 1
        assert [plan.continues(step) for step in steps] == [False] + [True] * (len(steps) - 1)
    else:
        rows = sum(batches, [])
        assert all(rows) and sum(rows, []) == stream
        assert {len(row) for row in rows[:-1]} <= {choice["max_tokens"]}
        assert {len(batch) for batch in batches[:-1]} <= {choice["global_batch"]}
        assert not any(plan.continues(step) for step in steps)


@pytest.mark.seconds
@settings(max_examples=40, deadline=None)
@given(packed_plans, st.data())
def test_packed_rows_do_not_depend_on_what_was_read_before(
    chosen: tuple, data: st.DataObject
) -> None:
    examples, choice = chosen
    plan = PackedPlan(examples, **choice)
    run = [rows_of(plan, step) for step in range(3 * plan.steps_per_epoch)]
    start = data.draw(st.integers(0, len(run) - 1))
    other = PackedPlan(examples, **choice)
    assert [rows_of(other, step) for step in range(start, len(run))] == run[start:]
    # Nor on which other rows are read in the same call, which is a worker's slice.
    starts, stops = plan.ranges(start)
    row = data.draw(st.integers(0, len(starts) - 1))
    alone = plan.parts(plan.epoch_of(start), starts[row : row + 1], stops[row : row + 1])
    tokens = [(int(e), t) for _, e, a, b in zip(*alone, strict=True) for t in range(a, b)]
    assert tokens == run[start][row]


def test_a_packed_step_asks_for_few_lengths() -> None:
    examples = Lengths(np.full(100_000, 100))
    for carried in (False, True):
        plan = PackedPlan(examples, max_tokens=400, global_batch=64, seed=0, carried=carried)
        plan.parts(0, *plan.ranges(0))
        examples.asked = 0
        plan.parts(0, *plan.ranges(77))
        assert examples.asked <= 64 * 2 * 32


def bad_bucketed() -> None:
    make(np.array([], np.int64), 0, seed=-1, bucket_batches=0)


def bad_packed() -> None:
    PackedPlan(Lengths(np.array([])), max_tokens=0, global_batch=0, seed=-1)


@pytest.mark.parametrize("bad", [bad_bucketed, bad_packed])
def test_bad_arguments_are_reported_together(bad: Callable[[], None]) -> None:
    with pytest.raises(InputError) as error:
        bad()
    assert len(str(error.value).splitlines()) == 4


def test_bad_steps_and_choices() -> None:
    with pytest.raises(ValueError, match="step -1"):
        make(np.array([1]), 1).indices(-1)
    with pytest.raises(ValueError, match="step -1"):
        PackedPlan(Lengths([3]), max_tokens=2, global_batch=1, seed=0).ranges(-1)
    with pytest.raises(ValueError, match="shard 2 of 2"):
        shard_rows(5, 2, 2)
    with pytest.raises(ValueError, match="either"):
        make(np.array([1]), 1, tokens_per_batch=1000)
    assert not PackedPlan(Lengths([3]), max_tokens=2, global_batch=1, seed=0).carried
    with pytest.raises(InputError, match="of 399 tokens cannot hold"):
        make(np.array([1]), None, tokens_per_batch=399)


def test_lengths_are_those_of_the_examples_cut() -> None:
    lengths = np.arange(1, 101)
    plan = BatchPlan(Lengths(lengths), max_tokens=60, global_batch=7, seed=3)
    for step in range(2 * plan.steps_per_epoch):
        expected = np.minimum(lengths[plan.indices(step)], 60)
        assert plan.lengths(step).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="step -1 is negative"):
        plan.lengths(-1)
