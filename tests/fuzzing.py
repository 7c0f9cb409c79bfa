"""How fuzz tests are run; `python -m tests.fuzzing [--minutes=10]` runs each for long.

Again and again with other seeds, until the minutes are over or one fails; each target in turn.
"""

import argparse
import os
import subprocess
import sys
import time

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings

FUZZ = settings(
    max_examples=int(os.environ.get("WARMSTATE_FUZZ_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# Changes of some bytes: how, where, and what is put there.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut"]),
        st.integers(0, 10_000),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)
TARGETS = {
    "bundles and checkpoints": "tests/trainer/test_safe_files.py",
    "stores": "tests/data_pipelines/store/test_token_store.py",
    "flags": "tests/trainer/test_preflight.py",
    "csv and jsonl": "tests/data_pipelines/sources/test_record_files.py",
}
SELECTED = "give_only_the_named_errors or ends_in_anything_but_an_input_error"


def edited(data: bytes, edits: list) -> bytes:
    """Returns `data` with EDITS made."""
    out = bytearray(data)
    for how, place, piece in edits:
        at = place % (len(out) + 1)
        if how == "set":
            out[at : at + len(piece)] = piece
        elif how == "insert":
            out[at:at] = piece
        elif how == "delete":
            del out[at : at + len(piece)]
        else:
            del out[at:]
    return bytes(out)


def main() -> int:
    """Returns the exit code: 1 if a target failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--examples", type=int, default=2000, help="a round and test")
    options = parser.parse_args()
    environment = os.environ | {"WARMSTATE_FUZZ_EXAMPLES": str(options.examples)}
    failed = 0
    for name, path in TARGETS.items():
        began, rounds, code = time.monotonic(), 0, 0
        while not code and time.monotonic() < began + 60 * options.minutes:
            rounds += 1
            seed = f"--hypothesis-seed={time.time_ns() % 2**32}"
            command = [sys.executable, "-m", "pytest", "-q", path, "-k", SELECTED, seed]
            code = subprocess.run(command, env=environment).returncode
        minutes = (time.monotonic() - began) / 60
        print(f"fuzz: {name}: {rounds} rounds, {minutes:.1f} minutes, {code=}", flush=True)
        failed |= code
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
