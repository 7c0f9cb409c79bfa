import sys
from pathlib import Path

import pytest

from tests import forked
from trainer.training.health import describe_nonfinite

REPOSITORY = Path(__file__).parents[3]


def test_what_is_not_finite_comes_first_and_long_lists_are_cut() -> None:
    norms = {"a": 1.0, "b": float("nan"), "c": 3.0, "d": float("inf"), "e": 2.0, "f": 0.1}
    said = describe_nonfinite(7, float("nan"), norms, list(range(70)))
    assert said.startswith("step 7 is not finite: loss nan; ")
    names = said.split("by their norm: ")[1].split(";")[0].split(", ")
    assert {names[0], names[1]} == {"b nan", "d inf"}
    assert names[2:] == ["c 3", "e 2", "a 1"]
    assert said.endswith("62, 63 and 6 more")
    assert describe_nonfinite(7, 1.0, norms, []).endswith("examples of the batch: unknown")


STALLS = """
import sys, threading
from trainer.training.health import StallWatchdog

with StallWatchdog(float(sys.argv[1])) as watchdog:
    for _ in range(3):
        watchdog.beat()
    if sys.argv[2] == "hang":
        threading.Event().wait()
print("came to the end")
threading.Event().wait(0.7)  # it no longer waits for a beat
"""


@pytest.mark.parametrize(
    ("seconds", "does", "code"), [("0.5", "hang", 1), ("0.5", "go on", 0), ("0", "go on", 0)]
)
def test_a_stall_ends_the_process_and_shows_where_it_hangs(
    seconds: str, does: str, code: int
) -> None:
    done = forked.run(
        [sys.executable, "-c", STALLS, seconds, does],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == code
    if code:
        assert "Timeout" in done.stderr and "in wait" in done.stderr
        assert "came to the end" not in done.stdout
    else:
        assert done.stderr == ""
