"""Horovod over MPI beside Horovod over Gloo: the small step of `allreduce` on one node.

Alternates between Gloo, MPI, and MPI that yields; each run starts two new processes. Requires a
Horovod built with MPI (`HOROVOD_CPU_OPERATIONS=MPI make horovod`) and Open MPI's mpirun. Prints one
table and writes benchmarks/results/horovod_mpi.json:

    python -m benchmarks.horovod_mpi --rounds=3
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.allreduce import gang, worker_program
from benchmarks.machine import facts
from benchmarks.processes import in_turn, markdown_table, write_results
from launch.local.workers import THREAD_VARIABLES

VOCABULARY, REPEATS, WORKERS = 30_000, 40, 2
# A rank that waits in MPI spins on its core unless this is set.
YIELD = ("--mca", "mpi_yield_when_idle", "1")


def by_mpirun(*options: str) -> list[dict[str, Any]]:
    """Returns a record a variant, measured by processes that mpirun starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = ["mpirun", "-np", str(WORKERS), "--bind-to", "none", *options]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command += worker_program("horovod", VOCABULARY, REPEATS, out)
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
    kinds = {
        "Gloo": lambda: gang("horovod", WORKERS, VOCABULARY, REPEATS),
        "MPI": by_mpirun,
        "MPI, mpi_yield_when_idle": lambda: by_mpirun(*YIELD),
    }
    results = {kind: summary(runs) for kind, runs in in_turn(kinds, args.rounds).items()}
    rows = [{"Horovod over": kind} | row for kind, each in results.items() for row in each]
    print(markdown_table(rows))
    write_results("horovod_mpi", facts(), results)


if __name__ == "__main__":
    main()
