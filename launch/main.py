"""Starts trainer processes.

python -m launch.main --platform=local --workers=N [--distributor=horovod] [--max_restarts=K]
    [--grace_seconds=5] [--dry_run] -- TRAINER_FLAGS
python -m launch.main --platform=local --elastic --min_workers=M --max_workers=N [--workers=START]
    [--available_workers=FILE] [...] -- TRAINER_FLAGS
python -m launch.main --platform=slurm --workers=N [--gpus_per_worker=G] [--cpus_per_worker=C]
    [--partition=P] [--account=A] [--time_limit=T] [--max_restarts=K] [--dry_run] -- TRAINER_FLAGS
python -m launch.main --platform=k8s --workers=N [--gpus_per_worker=G] [--overlay=indexed-job]
    [--image=I] [--namespace=S] [--queue=Q] [--follow] [...] [--dry_run] -- TRAINER_FLAGS
python -m launch.main --platform=k8s --elastic --min_workers=M --max_workers=N [--workers=START]
    [--distributor=horovod] [...] -- TRAINER_FLAGS
python -m launch.main status|logs|cancel NAME [--platform=P] [--namespace=S] [--follow]

What stands before `--` is the launcher's, what follows is each trainer's. NAME is what --name
gave the job; on SLURM its number will do as well.
"""

import difflib
import math
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from launch.kubernetes import command as kubernetes_command
from launch.local import elastic, horovod
from launch.local import jobs as local_jobs
from launch.local import workers as local
from launch.slurm import jobs as slurm_jobs
from launch.slurm import script as slurm

PLATFORMS = ("local", "slurm", "k8s")
ACTIONS = ("status", "logs", "cancel")
DISTRIBUTORS = ("auto", "horovod")

# Numbers are strings here, because absl stops at the first value that it cannot read and all faults
# are to be told at once.
_PLATFORM = flags.DEFINE_string("platform", "local", f"where to start: {', '.join(PLATFORMS)}")
_WORKERS = flags.DEFINE_string(
    "workers", "1", "trainer processes to start, 1 or more; with --elastic default --max_workers"
)
_DISTRIBUTOR = flags.DEFINE_string(
    "distributor", "auto", "how workers find each other: auto = TF_CONFIG, or horovod"
)
_MAX_RESTARTS = flags.DEFINE_string(
    "max_restarts",
    "0",
    "how often to start all again, from the last checkpoint, after a failure; with --elastic how "
    "many losses to survive, default any number; on k8s default 3",
)
_ELASTIC = flags.DEFINE_bool(
    "elastic",
    False,
    "go on with one worker less after a failure, and with more when there are more",
)
_MIN_WORKERS = flags.DEFINE_string("min_workers", None, "with --elastic: end the job below that")
_MAX_WORKERS = flags.DEFINE_string("max_workers", None, "with --elastic: never more than that")
_AVAILABLE_WORKERS = flags.DEFINE_string(
    "available_workers",
    None,
    "with --elastic: a file that holds how many workers there may be; the job follows each "
    "rewriting, and where there is no file it may have --max_workers",
)
_GPUS_PER_WORKER = flags.DEFINE_string("gpus_per_worker", None, "slurm, k8s: GPUs for each worker")
_NAME = flags.DEFINE_string(
    "name",
    None,
    "of the job, for status, logs and cancel; slurm, k8s: default warmstate; local: default none, "
    "with one the job is recorded in local-jobs/",
)
_WAIT = flags.DEFINE_bool(
    "wait", None, "slurm, k8s: return when the job has ended, with its exit code"
)
_FOLLOW = flags.DEFINE_bool(
    "follow", None, "slurm, k8s: --wait, print what the chief prints, and fetch the report"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the commands, start nothing")
_GRACE_SECONDS = flags.DEFINE_string(
    "grace_seconds", "5", "from TERM to KILL when workers are stopped, 0 or more"
)

_OF_A_START = (
    _WORKERS, _DISTRIBUTOR, _MAX_RESTARTS, _ELASTIC, _MIN_WORKERS, _MAX_WORKERS,
    _AVAILABLE_WORKERS, _GPUS_PER_WORKER, _NAME, _WAIT, _DRY_RUN, _GRACE_SECONDS,
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Starts the trainers with the flags after `argv`'s "--", or does what it says with a job.

    Args:
      argv: as `parse_flags` returns it.

    Returns the exit code.
    """
    _, first, *words = argv
    if first in ACTIONS:
        return _act(first, words[0])
    if _PLATFORM.value == "k8s":
        return _start_on_kubernetes(words)
    chosen = ["--distributor=horovod"] if _with_horovod() else []
    command = [sys.executable, "-u", "-m", "trainer.main", *chosen, *words]
    if _PLATFORM.value == "slurm":
        return _start_on_slurm(command)
    return _start_here(command)


def _act(action: str, name: str) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as of `logs NAME | head`
    follow = bool(_FOLLOW.value)
    if _PLATFORM.value == "k8s":
        return kubernetes_command.act(action, name, follow)
    jobs = slurm_jobs if _PLATFORM.value == "slurm" else local_jobs
    if action == "logs":
        return jobs.logs(name, follow)
    return jobs.status(name) if action == "status" else jobs.cancel(name)


def _start_here(command: Sequence[str]) -> int:
    limits = _limits() if _ELASTIC.value else None
    workers = (limits.start or limits.maximum) if limits else int(_WORKERS.value)
    if _DRY_RUN.value:
        if _with_horovod():
            print("# These need the launcher's rendezvous server, for whose port stands 0.")
        for index, line in enumerate(local.shell_commands(command, workers, _with_horovod())):
            print(f"# worker {index}\n{line}")
        return 0
    if _NAME.value is None:
        return _run_here(command, workers, limits)
    with local_jobs.recorded(_NAME.value, command, workers) as job:
        job.exit_code = _run_here(command, workers, limits)
    return job.exit_code


def _run_here(command: Sequence[str], workers: int, limits: elastic.Limits | None) -> int:
    grace_seconds = float(_GRACE_SECONDS.value)
    if limits:
        return elastic.run_elastic(command, limits, grace_seconds, _with_horovod())
    return local.run_local(
        command,
        workers,
        grace_seconds=grace_seconds,
        max_restarts=int(_MAX_RESTARTS.value),
        with_horovod=_with_horovod(),
    )


def _start_on_slurm(command: Sequence[str]) -> int:
    gpus = _GPUS_PER_WORKER.value
    job = slurm.job_of_flags(
        name=_NAME.value,
        workers=int(_WORKERS.value),
        gpus_per_worker=None if gpus is None else int(gpus),
        max_restarts=int(_MAX_RESTARTS.value),
    )
    if _DRY_RUN.value:
        print(slurm.script(command, job), end="")
        return 0
    code, number = slurm.submit(command, job)
    if code == 0 and (_WAIT.value or _FOLLOW.value):
        code = slurm_jobs.follow(number, quietly=not _FOLLOW.value)
    return code


def _start_on_kubernetes(trainer_flags: Sequence[str]) -> int:
    options = kubernetes_command.options_of_flags(
        _with_horovod(), _ELASTIC.value, **_kubernetes_numbers(), trainer_flags=trainer_flags
    )
    return kubernetes_command.run(
        options, _DRY_RUN.value, wait=bool(_WAIT.value), follow=bool(_FOLLOW.value)
    )


def _with_horovod() -> bool:
    return _DISTRIBUTOR.value == "horovod"


def _limits() -> elastic.Limits:
    file, minimum, maximum = _AVAILABLE_WORKERS.value, _MIN_WORKERS.value, _MAX_WORKERS.value
    assert minimum and maximum  # `_elastic_faults` has asked for them
    return elastic.Limits(
        minimum=int(minimum),
        maximum=int(maximum),
        start=int(_WORKERS.value) if _is_given("workers") else None,
        available_file=Path(file) if file else None,
        max_losses=int(_MAX_RESTARTS.value) if _is_given("max_restarts") else None,
    )


def _is_given(flag: str) -> bool:
    return bool(flags.FLAGS[flag].present)


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the launcher's flags.

    Returns the program's name, "--" and the trainer's flags; or its name, an action and a job's.

    Raises:
      SystemExit: with code 2, after one line a fault on stderr.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    words, faults = [], []
    try:
        flags.FLAGS.set_gnu_getopt()
        words = flags.FLAGS(argv[:end], known_only=True)[1:]
    except (flags.Error, ValueError) as error:
        faults.append(str(error))
        flags.FLAGS.mark_as_parsed()
    acts = bool(words) and words[0] in ACTIONS
    if acts:
        faults += _action_faults(words)
    else:
        faults += [_unknown_fault(word) for word in words]
        faults += _value_faults()
    if faults:
        print("\n".join(f"launch: {fault}" for fault in faults), file=sys.stderr)
        sys.exit(2)
    return [argv[0], *words] if acts else [argv[0], "--", *argv[end + 1 :]]


def _action_faults(words: Sequence[str]) -> list[str]:
    action, platform = words[0], _PLATFORM.value
    faults = []
    if platform not in PLATFORMS:
        faults.append(f"--platform={platform}: must be one of {', '.join(PLATFORMS)}")
    elif platform == "local" and sys.platform != "linux":
        faults.append(f"--platform=local: needs Linux, this is {sys.platform}")
    elif platform == "slurm" and shutil.which("scontrol") is None:
        faults.append("--platform=slurm: there is no scontrol here")
    if len(words) != 2:
        faults.append(f"{' '.join(words)}: must be {action} NAME, of one job")
    elif not re.fullmatch(slurm.NAME, words[1]):
        faults.append(f"{' '.join(words)}: no job can have that name")
    if _FOLLOW.value is not None and action != "logs":
        faults.append(f"--follow: {action} has no such flag")
    if _is_given("namespace") and platform != "k8s":
        faults.append(f"--namespace={flags.FLAGS.namespace}: needs --platform=k8s")
    of_a_start = [f"--{f.name}={f.value}" for f in _OF_A_START if _is_given(f.name)]
    of_a_start += [*slurm.given_flags(), *kubernetes_command.given_flags()]
    faults += [
        f"{flag}: {action} has no such flag"
        for flag in of_a_start
        if not flag.startswith("--namespace=")
    ]
    return faults


def _unknown_fault(word: str) -> str:
    name = word.lstrip("-").split("=")[0]
    near = difflib.get_close_matches(name, list(flags.FLAGS), n=1, cutoff=0.7)
    hint = f"; did you mean --{near[0]}?" if near else ""
    return f"{word}: not a launcher flag{hint}; trainer flags come after --"


def _value_faults() -> list[str]:
    faults = []
    if _PLATFORM.value not in PLATFORMS:
        faults.append(f"--platform={_PLATFORM.value}: must be one of {', '.join(PLATFORMS)}")
    elif _PLATFORM.value == "slurm":
        faults += _slurm_faults()
    elif _PLATFORM.value == "k8s":
        faults += _kubernetes_faults()
    elif sys.platform != "linux":
        faults.append(f"--platform=local: needs Linux, this is {sys.platform}")
    if not _is_at_least(1, int, _WORKERS.value):
        faults.append(f"--workers={_WORKERS.value}: must be a whole number, 1 or more")
    if _DISTRIBUTOR.value not in DISTRIBUTORS:
        faults.append(
            f"--distributor={_DISTRIBUTOR.value}: must be one of {', '.join(DISTRIBUTORS)}"
        )
    elif _PLATFORM.value == "k8s":
        pass  # Horovod is in the image
    elif _DISTRIBUTOR.value == "horovod" and not horovod.is_installed():
        faults.append("--distributor=horovod: Horovod is not installed; `make horovod` builds it")
    if not _is_at_least(0, int, _MAX_RESTARTS.value):
        faults.append(f"--max_restarts={_MAX_RESTARTS.value}: must be a whole number, 0 or more")
    if not _is_at_least(0, float, _GRACE_SECONDS.value):
        faults.append(f"--grace_seconds={_GRACE_SECONDS.value}: must be seconds, 0 or more")
    if _PLATFORM.value != "slurm":
        faults += [f"{flag}: needs --platform=slurm" for flag in slurm.given_flags()]
    if _PLATFORM.value != "k8s":
        faults += [f"{flag}: needs --platform=k8s" for flag in kubernetes_command.given_flags()]
    if _PLATFORM.value in ("slurm", "k8s") and _is_given("grace_seconds"):
        faults.append(f"--grace_seconds={_GRACE_SECONDS.value}: needs --platform=local")
    if _PLATFORM.value == "local":
        faults += [
            f"--{flag.name}: needs --platform=slurm or --platform=k8s"
            for flag in (_WAIT, _FOLLOW)
            if flag.value is not None
        ]
        if _NAME.value is not None and not _DRY_RUN.value:
            faults += local_jobs.faults(_NAME.value)
    if _PLATFORM.value == "local" and _GPUS_PER_WORKER.value is not None:
        faults.append(
            f"--gpus_per_worker={_GPUS_PER_WORKER.value}: needs --platform=slurm or --platform=k8s"
        )
    return faults + (_elastic_faults() if _ELASTIC.value else _not_elastic_faults())


def _slurm_faults() -> list[str]:
    faults = slurm.value_faults(_NAME.value, will_submit=not _DRY_RUN.value) + _gpu_faults()
    if _ELASTIC.value:
        faults.append("--elastic: needs --platform=local")
    if _DISTRIBUTOR.value == "horovod":
        faults.append(
            "--distributor=horovod: needs --platform=local; on SLURM use auto, or horovodrun in an "
            "allocation"
        )
    return faults


def _kubernetes_faults() -> list[str]:
    faults = _gpu_faults() + kubernetes_command.value_faults(
        _with_horovod(), _ELASTIC.value, **_kubernetes_numbers()
    )
    if _ELASTIC.value and _AVAILABLE_WORKERS.value is not None:
        faults.append(
            f"--available_workers={_AVAILABLE_WORKERS.value}: on k8s it is runs/NAME.workers"
        )
    return faults


def _kubernetes_numbers() -> dict[str, str | int | None]:
    """Returns the job's name and numbers; None for what is not given, or is no number."""

    def number(flag: flags.FlagHolder[Any]) -> int | None:
        text = flag.value if _is_given(flag.name) else None
        return int(text) if text and text.isascii() and text.isdecimal() else None

    workers = _MAX_WORKERS if _ELASTIC.value and not _is_given("workers") else _WORKERS
    return {
        "name": _NAME.value,
        "workers": number(workers) or 1,
        "gpus_per_worker": number(_GPUS_PER_WORKER),
        "max_restarts": number(_MAX_RESTARTS),
        "min_workers": number(_MIN_WORKERS),
        "max_workers": number(_MAX_WORKERS),
    }


def _gpu_faults() -> list[str]:
    gpus = _GPUS_PER_WORKER.value
    if gpus is None or _is_at_least(1, int, gpus):
        return []
    return [f"--gpus_per_worker={gpus}: must be a whole number, 1 or more"]


def _not_elastic_faults() -> list[str]:
    only_elastic = (_MIN_WORKERS, _MAX_WORKERS, _AVAILABLE_WORKERS)
    return [
        f"--{flag.name}={flag.value}: needs --elastic"
        for flag in only_elastic
        if flag.value is not None
    ]


def _elastic_faults() -> list[str]:
    faults = []
    limits = {flag.name: flag.value for flag in (_MIN_WORKERS, _MAX_WORKERS)}
    for name, value in limits.items():
        if value is None:
            faults.append(f"--elastic: needs --{name}")
        elif not _is_at_least(1, int, value):
            faults.append(f"--{name}={value}: must be a whole number, 1 or more")
    if not faults:
        minimum, maximum = (int(value) for value in limits.values() if value)
        between = f"--min_workers={minimum} and --max_workers={maximum}"
        start = int(_WORKERS.value) if _is_at_least(1, int, _WORKERS.value) else minimum
        if minimum > maximum:
            faults.append(f"{between}: the first must not be above the second")
        elif _is_given("workers") and not minimum <= start <= maximum:
            faults.append(f"--workers={start}: must be between {between}")
    if _AVAILABLE_WORKERS.value is not None and _PLATFORM.value == "local":
        file = Path(_AVAILABLE_WORKERS.value)
        if file.is_dir() or not file.parent.is_dir():
            faults.append(f"--available_workers={file}: must be a file in a folder that exists")
    return faults


def _is_at_least(minimum: int, number_type: type[int] | type[float], text: str) -> bool:
    try:
        number = number_type(text)
    except ValueError:
        return False
    return minimum <= number < math.inf


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
