"""The page of figures is what the last measurement printed."""

import subprocess
import sys

import numpy as np

from benchmarks import all as benchmarks
from benchmarks.processes import peak_megabytes


def test_the_page_is_that_of_the_results() -> None:
    assert benchmarks.PAGE.read_text() == benchmarks.page(), "run python -m benchmarks.all --render"


def test_the_peak_of_memory_is_that_of_the_process_not_of_who_started_it() -> None:
    held = np.ones(40_000_000)
    program = "from benchmarks.processes import peak_megabytes; print(peak_megabytes())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert 1 < float(done.stdout) < 100 < held.nbytes / 2**20 < peak_megabytes()
