"""Starts trainer processes.

python -m launch.main --platform=local --workers=N [--dry_run] [--grace_seconds=5] -- TRAINER_FLAGS

What stands before `--` is the launcher's, what follows is each trainer's.
"""

import math
import sys

from absl import app, flags

from launch import local

PLATFORMS = ("local",)

# Numbers are strings here, because absl stops at the first value that it cannot read and all faults
# are to be told at once.
_PLATFORM = flags.DEFINE_string("platform", "local", f"where to start: {', '.join(PLATFORMS)}")
_WORKERS = flags.DEFINE_string("workers", "1", "trainer processes to start, 1 or more")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the commands, start nothing")
_GRACE_SECONDS = flags.DEFINE_string(
    "grace_seconds", "5", "from TERM to KILL when workers are stopped, 0 or more"
)


def main(argv: list[str]) -> int:
    """Starts the trainers with the flags `argv[1:]`; returns the exit code."""
    command = [sys.executable, "-u", "-m", "trainer.main", *argv[1:]]
    workers = int(_WORKERS.value)
    if _DRY_RUN.value:
        for index, line in enumerate(local.shell_commands(command, workers)):
            print(f"# worker {index}\n{line}")
        return 0
    return local.run_local(command, workers, float(_GRACE_SECONDS.value))


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the launcher's flags; returns the program's name and the trainer's flags.

    Raises:
      SystemExit: with code 2, after one line a fault on stderr.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    faults = []
    try:
        flags.FLAGS.set_gnu_getopt()
        unknown = flags.FLAGS(argv[:end], known_only=True)[1:]
        faults += [f"{word}: not a launcher flag; trainer flags come after --" for word in unknown]
    except (flags.Error, ValueError) as error:
        faults.append(str(error))
        flags.FLAGS.mark_as_parsed()
    faults += _value_faults()
    if faults:
        print("\n".join(f"launch: {fault}" for fault in faults), file=sys.stderr)
        sys.exit(2)
    return [argv[0], *argv[end + 1 :]]


def _value_faults() -> list[str]:
    faults = []
    if _PLATFORM.value not in PLATFORMS:
        faults.append(f"--platform={_PLATFORM.value}: must be one of {', '.join(PLATFORMS)}")
    elif sys.platform != "linux":
        faults.append(f"--platform=local: needs Linux, this is {sys.platform}")
    if not _is_at_least(1, int, _WORKERS.value):
        faults.append(f"--workers={_WORKERS.value}: must be a whole number, 1 or more")
    if not _is_at_least(0, float, _GRACE_SECONDS.value):
        faults.append(f"--grace_seconds={_GRACE_SECONDS.value}: must be seconds, 0 or more")
    return faults


def _is_at_least(minimum: int, number_type: type[int] | type[float], text: str) -> bool:
    try:
        number = number_type(text)
    except ValueError:
        return False
    return minimum <= number < math.inf


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
