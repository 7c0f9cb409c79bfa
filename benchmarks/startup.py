"""Times the start of training: seconds from the process's start to its first steps.

python -m benchmarks.startup
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

from benchmarks.machine import facts
from benchmarks.processes import in_turn, min_and_median, write_results
from benchmarks.train_step import make_store

STEP = re.compile(r"pretrain step (\d+)/")


def first_steps(store: Path, folder: Path) -> dict[str, float]:
    """Returns the seconds to the first line, to step 1, and from there to step 2."""
    flags = {
        "stage": "pretrain",
        "store": store,
        "run_dir": folder,
        "resume": "never",
        "units": 256,
        "embedding_dim": 128,
        "pretrain_steps": 2,
        "pretrain_batch_size": 32,
        "pretrain_max_tokens": 100,
        "pretrain_evaluate_documents": 32,
        "mean_state_documents": 32,
        "log_every_steps": 1,
    }
    command = [sys.executable, "-m", "trainer.main", *(f"--{k}={v}" for k, v in flags.items())]
    found: dict[str, float] = {}
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            found.setdefault("first line", time.perf_counter() - began)
            if match := STEP.match(line):
                found[f"step {match[1]}"] = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{json.dumps(command)} ended with {process.returncode}")
    return found


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = ["| seconds from the process's start to | min (median) |", "|---|---|"]
    lines += [f"| {name} | {t['min']} ({t['median']}) |" for name, t in results.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="startup", help="name of the JSON")
    parser.add_argument("--store", help="token store of the reviews; made if missing")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = Path(args.store or Path(name) / "store")
        make_store(store)
        runs = in_turn({"run": lambda: first_steps(store, Path(name) / "run")}, args.repeats)["run"]
    results = {key: min_and_median([run[key] for run in runs]) for key in runs[0]}
    print(table(results))
    write_results(args.out, facts(), results)


if __name__ == "__main__":
    main()
