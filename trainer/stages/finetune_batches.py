"""Batches of labelled documents and, for virtual adversarial training, unlabelled ones."""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from data_pipelines.batches.batch_plan import BatchPlan
from data_pipelines.store.manifest import NO_LABEL
from trainer.distribution.over_batches import PER_ROW
from trainer.training.run import StoreBatches


@dataclass(frozen=True)
class FinetuneBatches:
    """The global batches (`task.Batches`) of fine-tuning.

    Elements are those of `make_dataset`, and `global_counts`. In each shard unlabelled rows, with
    labels of -1, follow the labelled ones.
    """

    labelled: StoreBatches
    unlabelled: StoreBatches | None = None  # documents read besides, in a separate order; or None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the labelled documents."""
        return self.labelled.steps_per_epoch

    def __call__(self, start_step: int, stop_step: int) -> tf.data.Dataset:
        dataset = self.labelled(start_step, stop_step)
        if self.unlabelled is not None:
            pairs = tf.data.Dataset.zip(dataset, self.unlabelled(start_step, stop_step))
            dataset = pairs.map(joined)
        return dataset.map(self._with_counts)

    def examples(self, step: int) -> list[int]:
        """Returns the numbers of the labelled documents in the global batch of `step`."""
        return self.labelled.examples(step)

    def texts(self, step: int) -> dict[int, str]:
        """Returns the texts of these documents."""
        return self.labelled.texts(step)

    def global_counts(self, step: int) -> np.ndarray:
        """Returns counts of the global batch of `step`, over all shards: float32 [3].

        They are the labelled documents, all documents, and the labelled documents' tokens.
        """
        plan = self.labelled.plan
        assert isinstance(plan, BatchPlan)  # only pretraining packs documents into rows
        lengths = plan.lengths(step)
        others = 0 if self.unlabelled is None else len(self.unlabelled.examples(step))
        return np.array([len(lengths), len(lengths) + others, lengths.sum()], np.float32)

    @tf.autograph.experimental.do_not_convert
    def _with_counts(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        counts = tf.numpy_function(self.global_counts, [batch["step"]], tf.float32, stateful=False)
        counts = tf.tile(tf.reshape(counts, [1, 3]), [tf.size(batch["lengths"]), 1])
        return {**batch, "global_counts": counts}


@tf.autograph.experimental.do_not_convert
def joined(
    labelled: dict[str, tf.Tensor], unlabelled: dict[str, tf.Tensor]
) -> dict[str, tf.Tensor]:
    """Joins two elements of the same step: each shard's rows, labelled ones first."""
    time = tf.maximum(tf.shape(labelled["tokens"])[1], tf.shape(unlabelled["tokens"])[1])
    parts = [labelled, {**unlabelled, "labels": tf.fill(tf.shape(unlabelled["labels"]), NO_LABEL)}]
    for part in parts:
        padding = time - tf.shape(part["tokens"])[1]
        part["tokens"] = tf.pad(part["tokens"], [[0, 0], [0, padding]])

    def rows(name: str) -> tf.Tensor:
        shards = range(labelled["row_starts"].shape[0] - 1)
        starts = [part["row_starts"] for part in parts]
        slices = [
            part[name][start[shard] : start[shard + 1]]
            for shard in shards
            for part, start in zip(parts, starts, strict=True)
        ]
        return tf.concat(slices, axis=0)

    return {
        **{name: rows(name) for name in labelled if name in PER_ROW},
        "row_starts": labelled["row_starts"] + unlabelled["row_starts"],
        "step": labelled["step"],
    }
