"""Which of this machine's GPUs each local worker sees."""

from collections.abc import Mapping
from pathlib import Path

VARIABLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")


def visible(environ: Mapping[str, str]) -> list[str]:
    """Returns the GPUs that a process would see, as CUDA_VISIBLE_DEVICES names them."""
    if VARIABLE not in environ:
        return [str(index) for index in range(len(list(DEVICES.glob("nvidia[0-9]*"))))]
    names = [name.strip() for name in environ[VARIABLE].split(",")]
    hidden = (index for index, name in enumerate(names) if name in ("", "-1"))
    return names[: next(hidden, len(names))]  # as CUDA reads it


def shares(workers: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns each worker's variables: as many GPUs for one as for another, and none for two.

    A single worker sees all; so do workers on a machine without GPUs.
    """
    gpus = visible(environ)
    if workers == 1 or not gpus:
        return [{}] * workers
    each = len(gpus) // workers
    starts = range(0, workers * each, each) if each else [0] * workers
    return [{VARIABLE: ",".join(gpus[start : start + each])} for start in starts]


def faults(workers: int, environ: Mapping[str, str]) -> list[str]:
    """Returns what is wrong with so many workers on this machine's GPUs."""
    count = len(visible(environ))
    if not 0 < count < workers:
        return []
    return [
        f"--workers={workers}: each needs a GPU, and this machine shows {count}: start at most "
        f"{count}, or train on the CPU with {VARIABLE}=-1"
    ]


def note(workers: int, environ: Mapping[str, str]) -> str:
    """Returns a line about GPUs that no worker gets, "" if there are none."""
    unused = len(visible(environ)) % workers
    return f"GPUs: {unused} are not used, because {workers} workers share equally" if unused else ""
