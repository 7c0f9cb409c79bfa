"""Times how much a checkpoint delays the steps of training, at the size of a laptop.

One process trains an autoencoder. Blocks of steps of three kinds take turns, so that noise
hits all alike: without a checkpoint; with one that is saved before the first step, as the loop
does it, and written with pauses; with one that is written at once. What is left to write after a
block is not timed. The CPU seconds of a step, of all threads and so with the writing one, say what
a checkpoint costs it however busy the machine is. Prints one table, writes one JSON:

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
KINDS = ("plain", "paced", "at once")


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


def make_step(folder: Path) -> tuple[Callable[[dict], Any], Checkpointer]:
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
    checkpoints = Checkpointer(folder, distributor, state, print)

    def run(batch: dict) -> None:
        step(batch, tf.constant(0.0)).loss.numpy()

    return run, checkpoints


def measure(blocks: int, folder: Path) -> dict[str, Any]:
    """Returns of each kind wall and CPU seconds [blocks, steps], and CPU seconds of calls."""
    run, checkpoints = make_step(folder)
    times: dict[str, list[list[tuple[float, float]]]] = {kind: [] for kind in KINDS}
    calls = []
    stream = iter(batches(0, (blocks + 1) * BLOCK_STEPS))
    for _ in range(BLOCK_STEPS):
        run(next(stream))
    for block in range(blocks):
        kind = KINDS[block % len(KINDS)]
        steps = []
        for place in range(BLOCK_STEPS):
            began = time.perf_counter(), time.process_time()
            if kind != "plain" and place == 0:
                call_began = time.thread_time()
                checkpoints.save(block + 1, {})
                calls.append(time.thread_time() - call_began)
            if kind == "at once" and place == 0:
                checkpoints._hurry.set()
            run(next(stream))
            steps.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        checkpoints.wait()
        times[kind].append(steps)
    newest = max(folder.glob("step-*"))
    return {
        "times": times,
        "calls": calls,
        "bytes": sum(f.stat().st_size for f in newest.iterdir()),
    }


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of the table: medians over blocks."""
    found = {kind: np.array(times) for kind, times in measured["times"].items()}
    step = np.median(found["plain"], axis=(0, 1))
    result: dict[str, Any] = {
        "checkpoint_bytes": measured["bytes"],
        "blocks_of_a_kind": len(found["plain"]),
        "steps_a_block": BLOCK_STEPS,
        "step_seconds": float(step[0]),
        "step_cpu_seconds": float(step[1]),
        "save_call_cpu_seconds": statistics.median(measured["calls"]),
    }
    for kind in KINDS[1:]:
        by_place = 100 * (np.median(found[kind], axis=0) / step - 1)  # [steps, (wall, CPU)]
        name = kind.replace(" ", "_")
        result |= {
            f"{name}_delay_percent": by_place[:, 0].round(1).tolist(),
            f"{name}_cpu_percent": by_place[:, 1].round(1).tolist(),
        }
    return result


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    Path("build").mkdir(exist_ok=True)  # which git ignores
    with tempfile.TemporaryDirectory(dir="build") as folder:
        result = {"machine": facts(), **summary(measure(options.blocks, Path(folder)))}
    for name, value in result.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
