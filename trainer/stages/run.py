"""What every stage is given: the configuration, the workers, the data, and a voice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan
from data_pipelines.batches.dataset import make_dataset
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers import load_tokenizer
from trainer import config as configuration
from trainer.config import Config
from trainer.distribution.distributor import Distributor
from trainer.distribution.preemption import StopRequest
from trainer.reporting.status_server import Vitals
from trainer.reporting.trackers import Tracker
from trainer.training.schedules import Schedule
from trainer.training.task import Settings


@dataclass(frozen=True)
class Run:
    """One sitting of a run in one process."""

    config: Config
    distributor: Distributor
    store: TokenStore
    stop_request: StopRequest
    log: Callable[[str], None]
    vitals: Vitals = field(default_factory=Vitals)
    trackers: Sequence[Tracker] = ()

    @property
    def folder(self) -> Path:
        """Returns the folder that the run writes."""
        return Path(self.config.run_dir)

    @property
    def is_chief(self) -> bool:
        """Returns True in the one process that writes and speaks."""
        return self.distributor.is_chief

    def plan(
        self,
        view: SplitView,
        batch_size: int,
        max_tokens: int,
        shuffle: bool = True,
        tokens_per_batch: int = 0,
    ) -> BatchPlan:
        """Returns the order in which `view` is read, from the run's seed.

        Args:
          tokens_per_batch: in place of `batch_size`, unless it is 0.
        """
        return BatchPlan(
            view,
            max_tokens=max_tokens,
            global_batch=None if tokens_per_batch else batch_size,
            tokens_per_batch=tokens_per_batch or None,
            seed=self.config.seed,
            shuffle=shuffle,
        )

    def batches(self, view: SplitView, plan: BatchPlan | PackedPlan) -> "Batches":
        """Returns what reads `view` in the plan's order."""
        return Batches(view, plan, self.distributor, self.store)

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

    def settings(self, stage: str, folder: Path, steps_per_epoch: int) -> Settings:
        """Returns the loop's settings for `stage`, "pretrain" or "finetune"."""
        config = self.config

        def of_stage(name: str) -> Any:
            return getattr(config, f"{stage}_{name}")

        return Settings(
            folder=folder,
            steps=of_stage("steps"),
            steps_per_epoch=steps_per_epoch,
            schedule=Schedule(
                kind=of_stage("schedule"),
                rate=of_stage("learning_rate"),
                decay=of_stage("learning_rate_decay"),
                warmup_fraction=of_stage("warmup_fraction"),
                steps=of_stage("steps"),
            ),
            ema=config.finetune_ema if stage == "finetune" else 0.0,
            optimizer=config.optimizer,
            clip_norm=config.clip_norm,
            accumulate_steps=config.accumulate_steps,
            sparse_reduce=config.sparse_reduce,
            compress=config.compress,
            check_divergence=config.check_divergence,
            log_every_steps=config.log_every_steps,
            checkpoint_every_steps=config.checkpoint_every_steps,
            evaluate_every_steps=of_stage("evaluate_every_steps"),
            resume=config.resume == "auto",
            keep_checkpoints=config.keep_checkpoints,
            keep_best=config.keep_best,
            checkpoint_errors=config.checkpoint_errors,
            on_nonfinite=config.on_nonfinite,
            max_skipped_steps=config.max_skipped_steps,
            stall_seconds=config.stall_seconds,
            steps_per_call=config.steps_per_call,
            scale_loss=config.precision == "mixed_float16",
            profile_steps=configuration.step_range(config.profile_steps) or (0, 0),
            replay_step=config.step,
            trackers=self.trackers,
        )


@dataclass(frozen=True)
class Batches:
    """(start_step, stop_step) -> this process's slices of those global batches."""

    view: SplitView
    plan: BatchPlan | PackedPlan
    distributor: Distributor
    store: TokenStore

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
        """Returns which examples of `view` the global batch of `step`, from 0, reads from."""
        if isinstance(self.plan, BatchPlan):
            return self.plan.indices(step).tolist()
        starts, stops = self.plan.ranges(step)
        real = starts < stops
        parts = self.plan.parts(self.plan.epoch_of(step), starts[real], stops[real])
        return list(dict.fromkeys(parts.example.tolist()))

    def texts(self, step: int) -> dict[int, str]:
        """Returns the text that the global batch of `step`, from 0, has of its examples.

        It is the tokens' text, not the source's; of rows that join documents, whole documents.
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
