"""Measures 1 to 16 real workers on this machine: bytes a step, memory, start, and the same losses.

    python -m benchmarks.worker_counts --store=runs/store     (as root: unshare, ip)

Each job runs in a network namespace, so that the counters of its loopback are its own. All jobs
train the same global batches. With more workers than cores their times say nothing; the bytes are
compared with the prediction, a ring in which each worker sends 2 (N - 1) / N of its gradients.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import facts
from benchmarks.processes import markdown_table
from data_pipelines.store.token_store import TokenStore

DIM, UNITS = 32, 64
STEPS, FIRST = 24, 8  # bytes and times are of the steps after FIRST
FLAGS = (
    f"--embedding_dim={DIM}", f"--units={UNITS}", "--precision=float32",
    "--stage=pretrain", "--pretrain_objective=language_model", "--sampled_softmax=64",
    "--sparse_reduce=dense", f"--pretrain_steps={STEPS}", "--pretrain_batch_size=32",
    "--pretrain_max_tokens=32", "--pretrain_evaluate_documents=32", "--mean_state_documents=32",
    "--log_every_steps=1", "--checkpoint_every_steps=1000",
)  # fmt: skip
WORKERS = (1, 2, 4, 8, 16)
OUT = Path("benchmarks/results/worker_counts.json")


def loopback_bytes(pid: int) -> int:
    """Returns the bytes that the loopback of a process's network namespace has sent."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError(f"process {pid} has no loopback")


def job(store: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Runs one job to its end; returns what it took."""
    launch = [sys.executable, "-m", "launch.main", "--platform=local", f"--workers={workers}"]
    command = [*launch, "--", *FLAGS, f"--store={store}", f"--run_dir={folder}"]
    inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    began, times, sent = time.monotonic(), [], []
    process = subprocess.Popen(["unshare", "--net", *inside], stdout=subprocess.PIPE, text=True)
    for line in process.stdout or ():
        if not re.search(rf"pretrain step \d+/{STEPS} ", line):
            continue
        times.append(time.monotonic())
        sent.append(loopback_bytes(process.pid))
        if len(times) == FIRST:
            launcher = psutil.Process(process.pid)
            each = [p.memory_full_info().pss for p in (launcher, *launcher.children(True))]
    if process.wait() or len(times) != STEPS:
        sys.exit(f"a job of {workers} workers ended with {process.returncode}, {len(times)} steps")
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "workers": workers,
        "seconds_to_step_1": round(times[0] - began, 1),
        "megabytes_of_the_largest_worker": round(max(each) / 2**20),
        "bytes_a_step": round((sent[-1] - sent[FIRST - 1]) / (STEPS - FIRST)),
        "losses": [row["loss"] for row in map(json.loads, metrics) if "loss" in row],
    }


def measure(store: Path) -> list[dict[str, Any]]:
    """Returns a row for each number of workers."""
    words = TokenStore(store).vocab_size
    parameters = words * (DIM + UNITS + 1) + 4 * UNITS * (DIM + UNITS + 1) + 2 * UNITS
    with tempfile.TemporaryDirectory() as name:
        rows = [job(store, Path(name) / str(workers), workers) for workers in WORKERS]
    losses = [np.array(row.pop("losses")) for row in rows]
    for row, found in zip(rows, losses, strict=True):
        row["predicted_bytes_a_step"] = 8 * (row["workers"] - 1) * parameters
        row["largest_difference_of_losses"] = float(f"{np.abs(found / losses[0] - 1).max():.1e}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    return markdown_table(
        [
            {
                "workers": row["workers"],
                "MB a step, sent by all": round(row["bytes_a_step"] / 1e6, 2),
                "predicted": round(row["predicted_bytes_a_step"] / 1e6, 2),
                "MB of the largest worker": row["megabytes_of_the_largest_worker"],
                "seconds to step 1": row["seconds_to_step_1"],
                "largest difference of a loss": row["largest_difference_of_losses"],
            }
            for row in rows
        ]
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = measure(options.store.resolve())
    options.out.write_text(json.dumps({"machine": facts(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
