"""What pretraining reads."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from tests.trainer.stages.test_split_predictions import NeverStops
from trainer.config import Config
from trainer.distribution.tf_distribute import one_device
from trainer.stages import pretrain
from trainer.training.run import Run

SOME_WORDS = 6  # in a row, which say what text they are from


def phrases(rows: list[np.ndarray]) -> set[tuple[int, ...]]:
    """Returns every SOME_WORDS tokens in a row."""
    return {
        tuple(row[start : start + SOME_WORDS].tolist())
        for row in rows
        for start in range(len(row) - SOME_WORDS + 1)
    }


def documents(view: SplitView) -> list[np.ndarray]:
    """Returns the tokens of each document."""
    tokens, lengths = view.gather(np.arange(len(view)), 10_000)
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize("packing", ["none", "stream"])
def test_pretraining_reads_every_training_text_and_none_of_validation_or_test(
    packing: str, small_store: Path, tmp_path: Path
) -> None:
    store = TokenStore(small_store)
    config = Config(
        run_dir=str(tmp_path), pretrain_objective="language_model", units=4, embedding_dim=4,
        pretrain_packing=packing, pretrain_batch_size=8, pretrain_max_tokens=50,
    )  # fmt: skip
    run = Run(config, one_device(), store, NeverStops(), lambda line: None)
    _, _, batches, _ = pretrain.set_up(run, tmp_path)
    read = [
        row[:length]
        for batch in batches(0, batches.steps_per_epoch)
        for row, length in zip(batch["tokens"].numpy(), batch["lengths"].numpy(), strict=True)
    ]
    trained = documents(store.split("train"))
    assert sum(map(len, read)) >= sum(map(len, trained))
    held_out = phrases(documents(store.split("validation")) + documents(store.split("test")))
    held_out -= phrases(trained)
    assert len(held_out) > 10_000
    assert not phrases(read) & held_out


def test_what_is_drawn_depends_on_the_step_and_the_shard_alone(
    small_store: Path, tmp_path: Path
) -> None:
    """So a resumed run draws what it would have drawn, whatever this process did before."""
    store = TokenStore(small_store)
    config = Config(
        run_dir=str(tmp_path), units=4, embedding_dim=4, pretrain_batch_size=8, sampled_softmax=8,
        pretrain_max_tokens=20, pretrain_dropout=0.5, pretrain_word_dropout=0.3,
        recurrent_weight_dropout=0.5,
    )  # fmt: skip
    run = Run(config, one_device(), store, NeverStops(), lambda line: None)
    _, task, batches, _ = pretrain.set_up(run, tmp_path)
    assert task.inputs == {"--store": store.sha256}  # a checkpoint remembers it
    (batch,) = batches(0, 1)
    rows = {name: batch[name] for name in ("tokens", "lengths", "weights")}

    @tf.function(autograph=False)
    def loss(step: tf.Tensor, shard: tf.Tensor) -> tf.Tensor:
        return task.loss_sum(rows, step, shard)[0]

    found = [
        float(loss(tf.constant(step, tf.int64), tf.constant(shard)))
        for step, shard in ((3, 0), (4, 0), (3, 1), (3, 0))
    ]
    assert found[0] == found[3] and len(set(found)) == 3
