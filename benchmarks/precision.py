"""Does training in bfloat16 lose what training in float32 loses?

    python -m benchmarks.precision --flagfile=trainer/configs/imdb_cpu_20min.cfg --data_dir=DIR \
        --store=runs/store

Pretrains twice, by the flags of trainer.main that are given, and compares what both logged. Takes
minutes, so `make bench` leaves it out; `python -m benchmarks.all --render` puts it into the page.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kept_runs import curves
from benchmarks.machine import facts
from benchmarks.processes import write_results
from trainer.training.precision import CHOICES


def run(precision: str, steps: int, flags: list[str], run_dir: Path) -> list[list[float]]:
    """Pretrains for `steps` steps; returns [step, loss] pairs, as they were logged."""
    command = [sys.executable, "-m", "trainer.main", *flags, "--stage=pretrain"]
    command += [f"--pretrain_steps={steps}", f"--precision={precision}", f"--run_dir={run_dir}"]
    subprocess.run(command, check=True)
    return curves(run_dir / "metrics.jsonl")["loss"]


def compare(losses: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Returns the losses of both, and by how many percent bfloat16's is off."""
    pairs = zip(*(losses[precision] for precision in CHOICES), strict=True)
    off = [100 * (half / whole - 1) for (_, whole), (_, half) in pairs]
    return {
        "steps": losses[CHOICES[0]][-1][0],
        "loss": losses,
        "off_by_percent_at_the_end": round(off[-1], 4),
        "off_by_percent_at_most": round(max(map(abs, off)), 4),
    }


def table(results: dict[str, Any]) -> str:
    """Returns what the page says."""
    rows = [f"| {name} | {results['loss'][name][-1][1]:.4f} |" for name in CHOICES]
    return "\n".join(
        [
            f"| precision | training loss after {results['steps']:,} steps |",
            "|---|---|",
            *rows,
            "",
            f"Off by {results['off_by_percent_at_the_end']:+.2f} % at the end, by "
            f"{results['off_by_percent_at_most']:.2f} % at most at any step that was logged.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", default="precision")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: run(name, options.steps, flags, Path(folder, name)) for name in CHOICES}
    results = compare(losses)
    write_results(options.out, facts(), results)
    print(table(results))


if __name__ == "__main__":
    main()
