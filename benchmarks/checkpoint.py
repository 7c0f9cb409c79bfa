"""Times how much a checkpoint delays the steps of training, at the size of a laptop.

One process trains an autoencoder. Blocks of steps alternate, so that a noisy machine is
noisy for both kinds: in every other block a checkpoint is saved before the first step, as the
loop does it, and written meanwhile; a block ends after the write does. CPU seconds of the call
and of the writing thread say what a checkpoint costs however busy the machine is. Prints one table,
writes one JSON:

    python -m benchmarks.checkpoint --out=benchmarks/results/checkpoint.json
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.machine import facts
from tests import loop_settings
from trainer.config import Config
from trainer.distribution.cluster import Cluster
from trainer.distribution.make import make_distributor
from trainer.models.sequence_autoencoder import SequenceAutoencoder
from trainer.stages import pretrain
from trainer.training.checkpoint import Checkpointer
from trainer.training.optimizer import Optimizer
from trainer.training.task import Task
from trainer.training.train_step import TrainStep

ROWS, TOKENS = 64, 128
CONFIG = Config(vocab_size=10_000, embedding_dim=128, units=128, sampled_softmax=256)
BLOCK_STEPS = 8


def batches(start: int, stop: int) -> tf.data.Dataset:
    """Returns batches of full rows, ROWS of TOKENS each."""
    tokens = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (16, ROWS, TOKENS), np.int32)

    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "tokens": tf.gather(tokens, step % 16),
            "lengths": tf.fill([ROWS], TOKENS),
            "labels": tf.zeros([ROWS], tf.int32),
            "weights": tf.ones([ROWS]),
            "row_starts": tf.constant([0, ROWS]),
            "step": step,
        }

    return tf.data.Dataset.range(start, stop).map(load)


class _Timed(Checkpointer):
    """Notes the CPU seconds of each write."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.cpu_seconds: list[float] = []

    def _write(self, *args: Any) -> None:
        super()._write(*args)
        self.cpu_seconds.append(time.thread_time())  # the thread is new


def make_step(folder: Path) -> tuple[Callable[[dict], Any], _Timed]:
    """Returns the training step of pretraining, and what saves its state."""
    distributor = make_distributor("one_device", Cluster(0, 1), 10)
    with distributor.scope():
        encoder = pretrain.make_encoder(CONFIG, CONFIG.vocab_size)
        model = SequenceAutoencoder(encoder, tied=False)
        model.build()
        variables = pretrain.trained_variables(model)
    stage = loop_settings.stage(steps=100_000, learning_rate=1e-3)
    optimizer = Optimizer("adam", stage, variables, distributor)
    task = Task("pretrain", folder, stage, variables, pretrain.loss_sum(model, CONFIG), dict)
    step = TrainStep(task, loop_settings.config(), distributor, optimizer, batches(0, 1))
    state = {**variables, **optimizer.variables}
    checkpoints = _Timed(folder, distributor, state, print)

    def run(batch: dict) -> None:
        step(batch, tf.constant(0.0)).loss.numpy()

    return run, checkpoints


def measure(blocks: int, folder: Path) -> dict[str, Any]:
    """Returns seconds of steps with and without a checkpoint, in the order of time."""
    run, checkpoints = make_step(folder)
    times: dict[str, list[list[float]]] = {"plain": [], "saving": []}
    saves = []
    stream = iter(batches(0, (blocks + 1) * BLOCK_STEPS))
    for _ in range(BLOCK_STEPS):
        run(next(stream))
    for block in range(blocks):
        kind = ("plain", "saving")[block % 2]
        steps = []
        for place in range(BLOCK_STEPS):
            began = time.perf_counter()
            if kind == "saving" and place == 0:
                cpu = time.thread_time()
                checkpoints.save(block + 1, {})
                saves.append(time.thread_time() - cpu)
            run(next(stream))
            steps.append(time.perf_counter() - began)
        checkpoints.wait()
        times[kind].append(steps)
    bytes_written = sum(f.stat().st_size for f in next(iter(folder.glob("step-*"))).iterdir())
    return {
        "times": times,
        "saves": saves,
        "writes": checkpoints.cpu_seconds,
        "bytes": bytes_written,
    }


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of the table: medians over blocks, seconds."""
    plain, saving = (np.array(measured["times"][kind]) for kind in ("plain", "saving"))
    step = float(np.median(plain))
    # Each block against the one before it.
    extra = np.sum(saving, axis=1) - np.sum(plain[: len(saving)], axis=1)
    first = float(np.median(saving[:, 0]))
    return {
        "checkpoint_bytes": measured["bytes"],
        "blocks": len(saving),
        "steps_a_block": BLOCK_STEPS,
        "step_seconds": step,
        "save_call_cpu_seconds": statistics.median(measured["saves"]),
        "write_cpu_seconds": statistics.median(measured["writes"]),
        "first_step_seconds": first,
        "first_step_delay_percent": 100 * (first / step - 1),
        "delay_of_a_checkpoint_seconds": float(np.median(extra)),
        "delay_of_the_block_percent": 100 * float(np.median(extra)) / (step * BLOCK_STEPS),
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        result = {"machine": facts(), **summary(measure(options.blocks, Path(folder)))}
    for name, value in result.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
