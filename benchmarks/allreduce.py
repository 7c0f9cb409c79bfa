"""What a training step pays for its collectives: bytes and milliseconds, by distributor.

Each gang of worker processes trains the real sequence autoencoder (64 cells, batch 16 x 64 tokens
a worker) with its gradients reduced in several ways, taken in turn step by step: the embedding
tables whole, as rows, and compressed, and each without collectives ("alone": what the step costs
on the same busy cores). Prints one table and writes one JSON:

    python -m benchmarks.allreduce --out=benchmarks/results/allreduce.json
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainer.training.task import Task
from trainer.training.train_step import TrainStep

ROWS, TOKENS, UNITS, SAMPLED = 16, 64, 64, 256  # of each worker
VOCABULARIES = (30_000, 300_000)
KINDS = ("multi_worker", "horovod")
# name: (sparse_reduce, compress)
VARIANTS = {
    "alone": ("dense", "none"),
    "dense": ("dense", "none"),
    "rows alone": ("rows", "none"),
    "rows": ("rows", "none"),
    "dense fp16": ("dense", "fp16"),
    "dense bf16": ("dense", "bf16"),
}


def gang(
    kind: str, workers: int, vocab_size: int, repeats: int, **environment: str
) -> list[dict[str, Any]]:
    """Returns one record a variant, measured by `workers` processes of `kind`.

    Raises:
      RuntimeError: a worker failed; with what was printed.
    """
    from tests.integration.equivalence import run_workers

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        program = worker_program(kind, vocab_size, repeats, out)
        done = run_workers(program, workers, kind == "horovod", **environment)
        if done.returncode:
            raise RuntimeError(done.stdout)
        return json.loads(out.read_text())


def worker_program(kind: str, vocab_size: int, repeats: int, out: Path) -> list[str]:
    """Returns the command of one worker of a gang."""
    program = [sys.executable, "-m", "benchmarks.allreduce", f"--worker={kind}"]
    return [*program, f"--vocab_size={vocab_size}", f"--repeats={repeats}", f"--out={out}"]


def worker(kind: str, vocab_size: int, repeats: int, out: Path) -> None:
    """Measures as one worker of a gang; the chief writes `out`."""
    from data_pipelines.quiet_tensorflow import import_quietly

    import_quietly()
    import tensorflow as tf

    from tests import loop_settings
    from trainer.distribution import cluster as clusters
    from trainer.distribution.make import make_distributor
    from trainer.training.optimizer import Optimizer

    distributor = make_distributor(kind, clusters.resolve(os.environ), 60.0)
    with distributor.scope():
        task = make_task(vocab_size)
    batches = random_batches(vocab_size, distributor.rank)
    steps = {}
    for name, (sparse_reduce, compress) in VARIANTS.items():
        used = Alone(distributor) if name.endswith("alone") else distributor
        chosen = loop_settings.config(sparse_reduce=sparse_reduce, compress=compress)
        optimizer = Optimizer("adam", task.stage, task.variables, distributor)
        steps[name] = TrainStep(task, chosen, used, optimizer, batches(0, 1))
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(batches(0, repeats + 2)):
        for name, step in steps.items():
            distributor.barrier()
            began = time.perf_counter()
            float(step(batch, tf.constant(0.0))[0])
            if number >= 2:  # the first one traces
                milliseconds[name].append(1e3 * (time.perf_counter() - began))
    if distributor.is_chief:
        out.write_text(json.dumps(records(kind, vocab_size, distributor, task, milliseconds)))


def records(kind: str, vocab_size: int, distributor, task, milliseconds: dict) -> list[dict]:
    """Returns for each variant its median step, what of it is communication, and its bytes."""
    from trainer.training.reduction import dense_bytes, row_bytes

    sizes = {name: 4 * int(np.prod(v.shape)) for name, v in task.variables.items()}
    tables = {name: sizes[name] for name in ("embeddings", "softmax/kernel", "softmax/bias")}
    tokens = next(iter(random_batches(vocab_size, 0)(0, 1)))["tokens"].numpy()
    distinct = len(np.unique(tokens))
    whole = {
        "alone": 0.0,
        "rows alone": 0.0,
        "dense": dense_bytes(sum(sizes.values()), distributor),
        # The softmax's rows are those of the targets and of the candidates.
        "rows": dense_bytes(sum(sizes.values()) - sum(tables.values()), distributor)
        + row_bytes(distinct, 4 * (UNITS + 1), distributor)
        + row_bytes(distinct + SAMPLED, 4 * (UNITS + 1) + 4 * 2, distributor),
    }
    whole |= {name: whole["dense"] / 2 for name in ("dense fp16", "dense bf16")}
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    found = []
    for name, times in milliseconds.items():
        median = medians[name]
        alone = medians["rows alone" if name.startswith("rows") else "alone"]
        found.append(
            {
                "distributor": kind,
                "workers": distributor.size,
                "vocab_size": vocab_size,
                "reduction": name,
                "megabytes_sent": round(whole[name] / 1e6, 3),
                "step_ms_median": round(median, 2),
                "step_ms_min": round(min(times), 2),
                "communication_ms": round(max(0.0, median - alone), 2),
                "communication_fraction": round(max(0.0, 1 - alone / median), 3),
            }
        )
    return found


class Alone:
    """A distributor whose sums are left out: what a step costs without communication."""

    def __init__(self, distributor):
        self._distributor = distributor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._distributor, name)

    def all_reduce_sum(self, tensors: list) -> list:
        """Returns the tensors as they are."""
        return list(tensors)

    def all_gather_rows(self, slices: list, counts: Any) -> list:
        """Returns the rows as they are."""
        return list(slices)


def make_task(vocab_size: int):
    """Returns the pretraining task; call it in the distributor's scope."""
    import tensorflow as tf

    from trainer.config import StageConfig
    from trainer.models.encoder import Encoder
    from trainer.models.sequence_autoencoder import SequenceAutoencoder
    from trainer.models.text_model import Noise
    from trainer.stages.pretrain import trained_variables
    from trainer.training import seeds

    model = SequenceAutoencoder(Encoder(vocab_size, UNITS, UNITS, seed=0))
    model.build()

    def loss_sum(rows: dict, step: tf.Tensor, shard: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = seeds.fold(0, seeds.SOFTMAX_CANDIDATES, step)
        noise = Noise(num_sampled=SAMPLED, softmax_seed=seed)
        return model.loss_sum(rows, training=True, noise=noise)

    stage = StageConfig(steps=1_000, learning_rate=1e-3)
    return Task("pretrain", Path(), stage, trained_variables(model), loss_sum, evaluate=dict)


def random_batches(vocab_size: int, rank: int):
    """Returns (start, stop) -> batches of ids that follow Zipf's law."""
    import tensorflow as tf

    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        uniform = tf.random.stateless_uniform([ROWS, TOKENS], [rank, step])
        ids = tf.exp(uniform * np.log(vocab_size + 1.0)) - 1.0
        return {
            "tokens": tf.clip_by_value(tf.cast(ids, tf.int32), 3, vocab_size - 1),
            "lengths": tf.fill([ROWS], TOKENS),
            "labels": tf.zeros([ROWS], tf.int32),
            "weights": tf.ones([ROWS]),
            "row_starts": tf.constant([0, ROWS]),
            "step": tf.cast(step, tf.int64),
        }

    return lambda start, stop: tf.data.Dataset.range(start, stop).map(
        lambda step: load(tf.cast(step, tf.int32))
    )


def table(found: list[dict[str, Any]]) -> str:
    """Returns the records as a Markdown table."""
    lines = [
        "| distributor | workers | vocabulary | reduction | MB sent a step | step, ms "
        "| communication, ms | share of the step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['distributor']} | {r['workers']} | {r['vocab_size']:,} | {r['reduction']} "
        f"| {r['megabytes_sent']:.2f} | {r['step_ms_median']:.1f} | {r['communication_ms']:.1f} "
        f"| {100 * r['communication_fraction']:.0f} % |"
        for r in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs all gangs, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/allreduce.json"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--vocab_size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.vocab_size, args.repeats, args.out)
        return
    from benchmarks.machine import facts

    found = [
        record
        for vocab_size in VOCABULARIES
        for kind in KINDS
        for record in gang(kind, 2, vocab_size, args.repeats)
    ]
    print(table(found))
    args.out.write_text(json.dumps({"machine": facts(), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
