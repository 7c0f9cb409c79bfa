"""Runs every speed benchmark, one after the other, and writes docs/performance.md.

    python -m benchmarks.all      (make bench, make bench-gpu)

The page is performance.template.md with the tables of benchmarks/results/*.json, so a benchmark
that was run on its own changes the page by `--render`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import in_words

RESULTS = Path("benchmarks/results")
TEMPLATE = Path("benchmarks/performance.template.md")
PAGE = Path("docs/performance.md")
WITH_STORE = ("train_step", "predict", "startup", "task_bank")
NAMES = ("lstm_layer", "softmax", *WITH_STORE, "serve")
ON_GPU = ("lstm_layer", "softmax")


def run_all(names: tuple[str, ...], suffix: str) -> None:
    """Runs the benchmarks; what fails is said at the end, after the others."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            command = [sys.executable, "-m", f"benchmarks.{name}", f"--out={name}{suffix}"]
            if name in WITH_STORE:
                command.append(f"--store={folder}/store")
            print(f"\n{name}", flush=True)
            began = time.perf_counter()
            failed += [name] if subprocess.run(command).returncode else []
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def page() -> str:
    """Returns docs/performance.md: the template with the results that are there."""
    from benchmarks import (
        lstm_layer,
        precision,
        predict,
        serve,
        softmax,
        startup,
        task_bank,
        train_step,
    )

    tables = {
        "lstm_layer": lstm_layer.table,
        "softmax": softmax.table,
        "train_step": lambda results: train_step.table(results["rows"]),
        "predict": predict.table,
        "startup": startup.table,
        "serve": serve.table,
        "precision": precision.table,
        "task_bank": task_bank.table,
    }
    text = TEMPLATE.read_text()
    for name, table in tables.items():
        for which in (name, f"{name}_gpu", f"{name}_avx2"):
            text = text.replace(f"{{{which}}}", of_file(RESULTS / f"{which}.json", table))
    return text


def of_file(path: Path, table: Any) -> str:
    """Returns the table of one file of results, and the machine; or that it was not run."""
    if not path.exists():
        return "(not run yet)"
    held = json.loads(path.read_text())
    machine = held["machine"]
    where = in_words(machine)
    if machine.get("gpu_name"):
        where = f"{machine['gpu_name']}, TensorFlow {machine['tensorflow']}"
    return f"{table(held['results'])}\n\n({where})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="only what a GPU changes, on a GPU")
    parser.add_argument("--render", action="store_true", help="only write the page")
    args = parser.parse_args()
    if args.gpu:
        import tensorflow as tf

        if not tf.config.list_physical_devices("GPU"):
            sys.exit("bench-gpu was NOT run: TensorFlow sees no GPU on this machine")
    if not args.render:
        run_all(ON_GPU if args.gpu else NAMES, "_gpu" if args.gpu else "")
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
