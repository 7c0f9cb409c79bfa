"""Horovod over MPI beside Horovod over Gloo: the small step of `allreduce` on one node.

Takes the kinds in turn, each run two processes of its own. Needs a Horovod that was built with MPI
(`HOROVOD_CPU_OPERATIONS=MPI make horovod`) and Open MPI's mpirun. Prints one table and writes
benchmarks/results/horovod_mpi.json:

    python -m benchmarks.horovod_mpi --rounds=3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.allreduce import gang
from benchmarks.machine import facts
from benchmarks.processes import markdown_table, write_results
from launch.local.workers import THREAD_VARIABLES

VOCABULARY, REPEATS, WORKERS = 30_000, 40, 2
# A process that waits in MPI polls, unless it is told to give the core away.
KINDS = {
    "Gloo": None,
    "MPI": [],
    "MPI, mpi_yield_when_idle": ["--mca", "mpi_yield_when_idle", "1"],
}


def by_mpirun(options: list[str]) -> list[dict[str, Any]]:
    """Returns a record a variant, measured by processes that mpirun starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = ["mpirun", "-np", str(WORKERS), "--bind-to", "none", *options]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command += [sys.executable, "-m", "benchmarks.allreduce", "--worker=horovod"]
        command += [f"--vocab_size={VOCABULARY}", f"--repeats={REPEATS}", f"--out={out}"]
        threads = dict.fromkeys(THREAD_VARIABLES, "1")
        done = subprocess.run(
            command, env=os.environ | threads, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return json.loads(out.read_text())


def summary(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the medians over the runs, a record a variant."""
    return [
        {
            "reduction": records[0]["reduction"],
            "MB sent": round(records[0]["megabytes_sent"], 2),
            "step, ms": round(statistics.median(r["step_ms_median"] for r in records), 1),
            "of it communication, ms": round(
                statistics.median(r["communication_ms"] for r in records), 1
            ),
        }
        for records in zip(*runs, strict=True)
    ]


def main() -> None:
    """Measures all kinds in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    runs: dict[str, list[list[dict[str, Any]]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind, options in KINDS.items():
            is_gloo = options is None
            found = gang("horovod", WORKERS, VOCABULARY, REPEATS) if is_gloo else by_mpirun(options)
            runs[kind].append(found)
    results = {kind: summary(each) for kind, each in runs.items()}
    rows = [{"Horovod over": kind} | row for kind, each in results.items() for row in each]
    print(markdown_table(rows))
    write_results("horovod_mpi", facts(), results)


if __name__ == "__main__":
    main()
