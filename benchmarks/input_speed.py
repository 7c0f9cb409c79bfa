"""The input pipeline against a consumer that takes batches in no time: can it feed eight GPUs?

    python -m benchmarks.input_speed --store=DIR      (make it with data_pipelines.prepare)

Reads the batches of one of WORKERS workers as pretraining does: plan, gather, padding, tf.data.
Each worker of a machine with eight GPUs has at least one core for it, so what counts is tokens in a
second of processor time; times WORKERS, that is the machine's. `shapes` are the different shapes of
batches in an epoch: cuDNN and XLA prepare something for each. Copies to a device are not in it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.machine import facts
from benchmarks.processes import markdown_table, min_and_median, write_results
from data_pipelines.batches.batch_plan import BatchPlan, shard_rows
from data_pipelines.batches.dataset import make_dataset, padded
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore

ROWS = (128, 16)  # of a worker
WORKERS = 8
MAX_TOKENS = 400
WANTED = 20e6  # tokens/s of all workers


def batches(view: SplitView, rows: int) -> tf.data.Dataset:
    """Returns the batches of the first of WORKERS workers with so many rows each, over and over."""
    plan = BatchPlan(view, max_tokens=MAX_TOKENS, global_batch=rows * WORKERS, seed=0)
    shards = {"first_shard": 0, "num_local_shards": 1, "num_shards": WORKERS}
    return make_dataset(view, plan, start_step=0, stop_step=10**9, **shards)


def read(dataset: tf.data.Dataset, seconds: float) -> dict[str, float]:
    """Returns tokens a second, by the clock and by the processor's time of this process."""
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    tokens, taken = 0, 0
    began, cpu_began = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        tokens += int(next(iterator)["lengths"].numpy().sum())
        taken += 1
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {"clock": tokens / elapsed, "cpu": tokens / cpu, "batch_ms": 1e3 * cpu / taken}


def shapes(view: SplitView, rows: int) -> int:
    """Returns how many different shapes a worker's batches of an epoch have."""
    plan = BatchPlan(view, max_tokens=MAX_TOKENS, global_batch=rows * WORKERS, seed=0)
    found = set()
    for step in range(plan.steps_per_epoch):
        first, stop = shard_rows(len(plan.lengths(step)), 0, WORKERS)
        found.add((stop - first, padded(int(plan.lengths(step).max()))))
    return len(found)


def measure(store: Path, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each of ROWS."""
    view = TokenStore(store).split("train").pieces(MAX_TOKENS)
    found = []
    for rows in ROWS:
        turns = [read(batches(view, rows), seconds) for _ in range(repeats)]
        rates = {name: min_and_median([turn[name] for turn in turns]) for name in turns[0]}
        best = max(turn["cpu"] for turn in turns)
        found.append(
            {
                "rows a worker": rows,
                "million tokens/s": round(rates["clock"]["median"] / 1e6, 2),
                "million tokens/CPU s": round(rates["cpu"]["median"] / 1e6, 2),
                "CPU ms a batch": round(rates["batch_ms"]["median"], 3),
                f"of {WORKERS} workers, million": round(WORKERS * best / 1e6, 1),
                "shapes": shapes(view, rows),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="input_speed", help="name of the JSON")
    args = parser.parse_args()
    rows = measure(args.store, args.seconds, args.repeats)
    write_results(args.out, facts(), rows)
    print(markdown_table(rows))
    print(f"wanted: {WANTED / 1e6:.0f} million tokens/s of {WORKERS} workers")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
