from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.batch_plan import BatchPlan
from data_pipelines.dataset import make_dataset
from data_pipelines.reserved_ids import END_ID
from data_pipelines.token_store import SplitView, TokenStore

MAX_TOKENS = 20


@pytest.fixture
def view(make_store: Callable[..., TokenStore]) -> SplitView:
    texts = [" ".join("abcde"[(i + j) % 5] for j in range(1 + i * 7 % 31)) for i in range(23)]
    documents = {"train": [(text, i % 2) for i, text in enumerate(texts)]}
    return make_store(documents, vocab_size=8, shard_examples=10).split("train")


@pytest.fixture
def plan(view: SplitView) -> BatchPlan:
    return BatchPlan(np.minimum(view.lengths, MAX_TOKENS), 5, seed=4)


def elements(view: SplitView, plan: BatchPlan, **changes: int) -> list[dict[str, np.ndarray]]:
    arguments = {
        "start_step": 0,
        "stop_step": 2 * plan.steps_per_epoch,
        "first_shard": 0,
        "num_local_shards": 1,
        "num_shards": 1,
        "max_tokens": MAX_TOKENS,
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
        max_tokens=MAX_TOKENS,
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
        np.testing.assert_array_equal(batch["labels"], view.labels[rows])
        assert batch["weights"].tolist() == [1] * len(rows)
        assert batch["row_starts"].tolist() == [0, len(rows)]
        assert time % 8 == 0 and time - 8 < lengths.max() <= time


@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_shards_together_are_the_global_batch(
    view: SplitView, plan: BatchPlan, num_shards: int
) -> None:
    whole = elements(view, plan)
    parts = [elements(view, plan, first_shard=s, num_shards=num_shards) for s in range(num_shards)]
    for step, batch in enumerate(whole):
        for key in ("tokens", "lengths", "labels"):
            real = [p[step][key][p[step]["weights"] == 1] for p in parts]
            np.testing.assert_array_equal(np.concatenate(real), batch[key])


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
        max_tokens=8,
    )
    policy = dataset.options().experimental_distribute.auto_shard_policy
    assert policy == tf.data.experimental.AutoShardPolicy.OFF
    assert dataset.options().deterministic


def test_foreign_plan_and_shards_are_refused(view: SplitView, plan: BatchPlan) -> None:
    with pytest.raises(ValueError, match="3 examples for a view of 23"):
        elements(view, BatchPlan(np.ones(3), 1, 0))
    with pytest.raises(ValueError, match="shards 1 .. 2 of 2"):
        elements(view, plan, first_shard=1, num_local_shards=2, num_shards=2)
