"""What every stage is given: configuration, workers, data and reporting."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow as tf

from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan
from data_pipelines.batches.dataset import make_dataset, most_shapes
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers import load_tokenizer
from trainer import native
from trainer.config import Config
from trainer.distribution.distributor import Distributor
from trainer.distribution.preemption import StopRequest
from trainer.reporting.status_server import Vitals
from trainer.reporting.trackers import Tracker


@dataclass(frozen=True)
class Run:
    """One sitting of a run in one process.

    Attributes:
        saved: To be called by the chief when a checkpoint, a bundle or a report is whole.
    """

    config: Config
    distributor: Distributor
    store: TokenStore
    stop_request: StopRequest
    log: Callable[[str], None]
    vitals: Vitals = field(default_factory=Vitals)
    trackers: Sequence[Tracker] = ()
    saved: Callable[[], None] = lambda: None

    @property
    def folder(self) -> Path:
        """The folder that the run writes."""
        return Path(self.config.run_dir)

    @property
    def is_chief(self) -> bool:
        """True in the one process that reads and writes files and prints."""
        return self.distributor.is_chief

    def plan(
        self,
        view: SplitView,
        batch_size: int,
        max_tokens: int,
        shuffle: bool = True,
        tokens_per_batch: int = 0,
        beside: BatchPlan | None = None,
    ) -> BatchPlan:
        """Returns the order in which `view` is read, from the run's seed.

        Args:
            max_tokens: Tokens that are read of an example, the last ones.
            shuffle: Whether each epoch has a new order.
            tokens_per_batch: In place of `batch_size`, unless it is 0.
            beside: The plan of what is read in the same steps.
        """
        return BatchPlan(
            view,
            max_tokens=max_tokens,
            global_batch=None if tokens_per_batch else batch_size,
            tokens_per_batch=tokens_per_batch or None,
            seed=self.config.seed,
            shuffle=shuffle,
            beside=beside,
        )

    def batches(self, view: SplitView, plan: BatchPlan | PackedPlan) -> "StoreBatches":
        """Returns the batches of `view` in the plan's order."""
        return StoreBatches(view, plan, self.distributor, self.store)

    def log_shapes(self, stage: str, plan: BatchPlan | PackedPlan) -> None:
        """On a GPU, prints for how many shapes of batches cuDNN has to plan its kernels."""
        if native.has_gpu():
            bound = most_shapes(plan)
            said = f"at most {bound}" if bound else "any number, because their rows vary"
            self.log(f"{stage}: batches have shapes: {said}")

    def some_documents(
        self, view: SplitView, documents: int, batch_size: int, max_tokens: int
    ) -> tf.data.Dataset:
        """Returns batches of about `documents` random documents, the same ones at every call."""
        plan = self.plan(view, batch_size, max_tokens)
        steps = min(plan.steps_per_epoch, -(-documents // batch_size))
        return self.batches(view, plan)(0, steps)

    def all_documents(self, view: SplitView, batch_size: int, max_tokens: int) -> tf.data.Dataset:
        """Returns batches of every document once."""
        plan = self.plan(view, batch_size, max_tokens, shuffle=False)
        return self.batches(view, plan)(0, plan.steps_per_epoch)


@dataclass(frozen=True)
class StoreBatches:
    """The global batches (`task.Batches`) of a view of the store, in the order of a plan."""

    view: SplitView
    plan: BatchPlan | PackedPlan
    distributor: Distributor
    store: TokenStore

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the view."""
        return self.plan.steps_per_epoch

    def __call__(self, start_step: int, stop_step: int) -> tf.data.Dataset:
        local = self.distributor.num_local_shards
        return make_dataset(
            self.view,
            self.plan,
            start_step=start_step,
            stop_step=stop_step,
            first_shard=self.distributor.rank * local,
            num_local_shards=local,
            num_shards=self.distributor.num_shards,
        )

    def examples(self, step: int) -> list[int]:
        """Returns the numbers of the examples of `view` in the global batch of `step`."""
        if isinstance(self.plan, BatchPlan):
            return self.plan.indices(step).tolist()
        starts, stops = self.plan.ranges(step)
        real = starts < stops
        parts = self.plan.parts(self.plan.epoch_of(step), starts[real], stops[real])
        return list(dict.fromkeys(parts.example.tolist()))

    def texts(self, step: int) -> dict[int, str]:
        """Returns the texts of these examples, decoded from tokens.

        If rows join documents, they are whole documents.
        """
        tokenizer = load_tokenizer(self.store.vocab_path, self.store.tokenizer_config)
        examples = np.array(self.examples(step), np.int64)
        joined = not isinstance(self.plan, BatchPlan)
        longest = int(self.view.lengths_of(examples).max(initial=1))
        tokens, lengths = self.view.gather(examples, longest if joined else self.plan.max_tokens)
        return {
            example: tokenizer.decode(row[:length].tolist())
            for example, row, length in zip(examples.tolist(), tokens, lengths, strict=True)
        }
