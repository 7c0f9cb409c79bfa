"""Every distributor and number of workers computes what one device does: the program and its runs.

As a program, `python -m tests.integration.equivalence KIND FOLDER NUMBER...`, it is one worker: it
trains a small classifier in the CASES of these numbers on the same global batches, of which some
leave workers without a row, and writes the losses and the final weights.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import forked
from trainer.training.task import Task
from trainer.training.train_step import TrainStep

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 12
DOCUMENTS, GLOBAL_BATCH = 25, 8  # the last batch of an epoch has one row
VOCAB_SIZE, WIDTH = 50, 6


class Case(NamedTuple):
    """One way to train."""

    optimizer: str
    dtype: str
    sparse_reduce: str
    accumulate_steps: int = 1

    @property
    def name(self) -> str:
        """Returns a name for files and tables."""
        parts = f" in {self.accumulate_steps} parts" if self.accumulate_steps > 1 else ""
        return f"{self.optimizer} {self.dtype} {self.sparse_reduce}{parts}"


CASES = (
    *(
        Case(optimizer, dtype, sparse_reduce)
        for optimizer in ("sgd", "adam")
        for dtype in ("float32", "float64")
        for sparse_reduce in ("dense", "rows")
    ),
    Case("sgd", "float64", "rows", accumulate_steps=2),
    Case("adam", "float64", "dense", accumulate_steps=3),
)
# Each pair of optimizer, type and way to reduce rows is in one of them.
FEW = (
    Case("sgd", "float32", "rows"),
    Case("sgd", "float64", "dense"),
    Case("adam", "float32", "dense"),
    Case("adam", "float64", "rows"),
    Case("adam", "float64", "dense", accumulate_steps=3),
)
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}


def relative_difference(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference of two runs, relative to the largest value of each array."""
    assert first.keys() == second.keys()
    return max(
        float(np.max(np.abs(first[name] - second[name])) / np.max(np.abs(first[name])))
        for name in first
    )


def results(
    kind: str, workers: int, folder: Path, cases: Sequence[Case] = CASES
) -> dict[Case, list[dict[str, np.ndarray]]]:
    """Trains in all `cases`; returns losses and final weights, by worker process.

    Raises:
      RuntimeError: a worker failed; with what was printed.
    """
    folder.mkdir(parents=True)
    processes = 1 if kind in ("one_device", "mirrored") else workers
    chosen = [str(CASES.index(case)) for case in cases]
    worker = [sys.executable, "-m", "tests.integration.equivalence", kind, str(folder), *chosen]
    done = run_workers(worker, processes, kind == "horovod", EQUIVALENCE_DEVICES=str(workers))
    if done.returncode:
        raise RuntimeError(done.stdout)
    return {
        case: [dict(np.load(folder / f"{case.name}.{rank}.npz")) for rank in range(processes)]
        for case in cases
    }


def run_workers(
    command: list[str], workers: int, with_horovod: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Runs `command` as `workers` processes under the product's launcher; returns its output."""
    launch = (
        "import sys; from launch.local.workers import run_local;"
        f"sys.exit(run_local(sys.argv[1:], {workers}, with_horovod={with_horovod}))"
    )
    return forked.run(
        [sys.executable, "-c", launch, *command],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "TF_CONFIG"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def main(kind: str, folder: Path, cases: Sequence[Case]) -> None:
    """Trains in all `cases` as one worker."""
    from data_pipelines.quiet_tensorflow import import_quietly

    import_quietly()
    import tensorflow as tf

    from trainer.distribution import cluster as clusters
    from trainer.distribution.make import make_distributor

    if kind == "multi_worker" and "TF_CONFIG" not in os.environ:  # one worker
        task = {"type": "worker", "index": 0}
        os.environ["TF_CONFIG"] = json.dumps(
            {"cluster": {"worker": [f"127.0.0.1:{free_port()}"]}, "task": task}
        )
    if kind == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        devices = int(os.environ["EQUIVALENCE_DEVICES"])
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * devices
        )
    tf.config.experimental.enable_op_determinism()
    distributor = make_distributor(kind, clusters.resolve(os.environ), 60.0)
    for case in cases:
        np.savez(folder / f"{case.name}.{distributor.rank}.npz", **train(case, distributor))


def free_port() -> int:
    """Returns a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def train(case: Case, distributor) -> dict[str, np.ndarray]:
    """Returns the losses and the final weights of one case."""
    import tensorflow as tf

    from tests import loop_settings
    from trainer.training.optimizer import Optimizer

    stage = loop_settings.stage(schedule="exponential", learning_rate_decay=0.99)
    task = make_task(case, distributor, stage)
    config = loop_settings.config(
        clip_norm=0.5,
        accumulate_steps=case.accumulate_steps,
        sparse_reduce=case.sparse_reduce,
    )
    optimizer = Optimizer(case.optimizer, stage, task.variables, distributor)
    batches = make_batches(distributor)
    step = TrainStep(task, config, distributor, optimizer, batches(0, 1))
    losses = [float(step(batch, tf.constant(0.0))[0]) for batch in batches(0, STEPS)]
    return {"losses": np.array(losses)} | {
        name: variable.numpy() for name, variable in task.variables.items()
    }


def make_task(case: Case, distributor, stage):
    """Returns a bag-of-words classifier with one hidden layer, all of it in `case.dtype`."""
    import keras
    import tensorflow as tf

    random = np.random.default_rng(0)
    shapes = {
        "embeddings": (VOCAB_SIZE, WIDTH),
        "hidden": (WIDTH, WIDTH),
        "output": (WIDTH, 1),
    }
    with distributor.scope():
        variables = {
            name: keras.Variable(random.normal(size=shape), dtype=case.dtype, name=name)
            for name, shape in shapes.items()
        }

    def loss_sum(rows: dict, step: tf.Tensor, shard: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        embedded = tf.nn.embedding_lookup(variables["embeddings"].value, rows["tokens"])
        mask = tf.sequence_mask(rows["lengths"], tf.shape(rows["tokens"])[1], case.dtype)
        mean = tf.reduce_sum(embedded * mask[:, :, None], 1) / tf.reduce_sum(mask, 1)[:, None]
        hidden = tf.tanh(tf.matmul(mean, variables["hidden"].value))
        logit = tf.matmul(hidden, variables["output"].value)[:, 0]
        truth = tf.cast(rows["labels"], case.dtype)
        weights = tf.cast(rows["weights"], case.dtype)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(truth, logit)
        return tf.reduce_sum(losses * weights), tf.reduce_sum(weights)

    return Task("finetune", Path(), stage, variables, loss_sum, evaluate=dict)


def make_batches(distributor):
    """Returns (start, stop) -> this process's slices of global batches of random documents."""
    from data_pipelines.batches.batch_plan import BatchPlan
    from data_pipelines.batches.dataset import make_dataset

    documents = RandomDocuments()
    plan = BatchPlan(documents, max_tokens=20, global_batch=GLOBAL_BATCH, seed=0)
    local = distributor.num_local_shards
    return lambda start, stop: make_dataset(
        documents,
        plan,
        start_step=start,
        stop_step=stop,
        first_shard=distributor.rank * local,
        num_local_shards=local,
        num_shards=distributor.num_shards,
    )


class RandomDocuments:
    """What `make_dataset` needs of a SplitView."""

    has_contexts = is_remote = False

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self._lengths = random.integers(1, 12, DOCUMENTS).astype(np.int32)
        self._labels = random.integers(0, 2, DOCUMENTS).astype(np.int32)
        self._tokens = random.integers(3, VOCAB_SIZE, (DOCUMENTS, 12)).astype(np.int32)

    def __len__(self) -> int:
        return DOCUMENTS

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the tokens of documents."""
        return self._lengths[indices]

    def located(self, indices: np.ndarray) -> np.ndarray:
        """Returns the places of documents: their numbers."""
        return indices

    def numbers(self, kind: str, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of documents."""
        assert kind == "labels"
        return self._labels[indices]

    def gather_located(
        self, indices: np.ndarray, max_tokens: int, pad_to: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and lengths, as `SplitView.gather_located` does."""
        lengths = self._lengths[indices]
        tokens = np.zeros((len(indices), pad_to), np.int32)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            tokens[row, :length] = self._tokens[index, :length]
        return tokens, lengths


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [CASES[int(number)] for number in sys.argv[3:]])
