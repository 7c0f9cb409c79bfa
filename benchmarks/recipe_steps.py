"""Two workers on the pretraining steps of recipes: words a second of real runs, interleaved.

Each run is the trainer's own, of the recipe's flags for STEPS steps. Rates are of its log, after
the first FIRST lines.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.processes import in_turn

STEPS, EVERY, FIRST = 60, 5, 3
SHORT = (
    "--stage=pretrain", f"--pretrain_steps={STEPS}", f"--log_every_steps={EVERY}",
    "--pretrain_evaluate_every_steps=1000", "--checkpoint_every_steps=1000",
    "--pretrain_evaluate_documents=32", "--mean_state_documents=32",
)  # fmt: skip
# Recipe: the flag that sizes its batch, and that size.
RECIPES = {
    "imdb_cpu_20min": ("pretrain_batch_size", 64),
    "demo": ("pretrain_tokens_per_batch", 6400),
}
ONE_CORE = "one process, one core"
# Name: workers, times the recipe's batch.
ARRANGEMENTS = {
    ONE_CORE: (1, 1),
    "one process, both cores": (1, 1),
    "two workers, the same batch": (2, 1),
    "two workers, the batch doubled": (2, 2),
}


def words_a_second(recipe: str, arrangement: str, store: Path) -> float:
    """Returns the median rate of a run's log."""
    workers, times = ARRANGEMENTS[arrangement]
    flag, size = RECIPES[recipe]
    command = [sys.executable, "-m", "trainer.main"]
    if workers > 1:
        command = [sys.executable, "-m", "launch.main", "--platform=local", f"--workers={workers}"]
        command += ["--"]
    if arrangement == ONE_CORE:
        command = ["taskset", "-c", "0", *command]
    command += [f"--flagfile=trainer/configs/{recipe}.cfg", *SHORT, f"--{flag}={times * size}"]
    with tempfile.TemporaryDirectory() as folder:
        command += [f"--store={store}", f"--run_dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        logged = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        rates = [row["tokens_per_second"] for row in logged if "tokens_per_second" in row]
    return statistics.median(rates[FIRST:])


def measure(stores: dict[str, Path], repeats: int = 3) -> list[dict[str, Any]]:
    """Returns a row for each recipe and arrangement.

    Args:
        stores: A token store for each recipe, with its vocabulary.
    """
    runs = {
        (recipe, arrangement): functools.partial(words_a_second, recipe, arrangement, store)
        for recipe, store in stores.items()
        for arrangement in ARRANGEMENTS
    }
    rates = in_turn(runs, repeats)
    medians = {key: statistics.median(found) for key, found in rates.items()}
    return [
        {
            "recipe": recipe,
            "": arrangement,
            "tokens/s": round(median),
            "of one core": round(median / medians[recipe, ONE_CORE], 2),
            "of both cores": round(median / medians[recipe, "one process, both cores"], 2),
        }
        for (recipe, arrangement), median in medians.items()
    ]
