"""Starts trainer processes on this machine, on SLURM or on Kubernetes.

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

Flags before `--` are the launcher's, those after it go to every trainer. NAME is the job's --name;
on SLURM its number works too.
"""

import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from absl import app, flags

from data_pipelines import flag_fields
from data_pipelines.errors import USAGE_EXIT_CODE
from data_pipelines.flag_fields import fields_of, flag
from launch.kubernetes.platform import Kubernetes
from launch.local.platform import Local
from launch.platform import NAME, Platform
from launch.slurm.platform import Slurm

PLATFORMS: dict[str, type[Platform[Any]]] = {"local": Local, "slurm": Slurm, "k8s": Kubernetes}
ACTIONS = ("status", "logs", "cancel")


@dataclass(frozen=True)
class Choice:
    """The flag that chooses the platform."""

    platform: str = flag(
        "Start", "local", "Platform to start the workers on.", choices=tuple(PLATFORMS)
    )


TABLES: list[type] = [Choice, *(each.options_class for each in PLATFORMS.values())]


def main(argv: list[str]) -> int:
    """Starts a job, or acts on one; returns the exit code.

    Args:
        argv: As `parse_flags` returns it.
    """
    platform = _platform(flags.FLAGS.platform)
    _, first, *words = argv
    if first not in ACTIONS:
        return platform.start(words)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as of `logs NAME | head`
    if first == "logs":
        return platform.logs(words[0], flags.FLAGS.follow)
    return platform.status(words[0]) if first == "status" else platform.cancel(words[0])


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the launcher's flags.

    Returns:
        The program's name, "--" and the trainer's flags; or its name, an action and a job's name.

    Raises:
        SystemExit: With code 2, after printing one line for each fault.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    if flag_fields.HELP_WORDS & set(argv[1:end]):
        print(flag_fields.program_help(__doc__, TABLES))
        sys.exit(0)
    advice = "; trainer flags come after --"
    faults, words = flag_fields.parse(argv[:end], advice=advice)
    acts = bool(words) and words[0] in ACTIONS
    if not acts:
        faults += [f"{word} is not a flag{advice}" for word in words]
    choice = flag_fields.from_flags(Choice)
    if wrong := flag_fields.value_faults(choice):
        for table in TABLES[1:]:
            wrong += flag_fields.value_faults(flag_fields.from_flags(table))
        faults += dict.fromkeys(wrong)
    else:
        platform = _platform(choice.platform)
        faults += _action_faults(words, platform) if acts else _start_faults(platform)
    if faults:
        print("\n".join(f"launch: {fault}" for fault in faults), file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    return [argv[0], *words] if acts else [argv[0], "--", *argv[end + 1 :]]


def _platform(name: str) -> Platform[Any]:
    kind = PLATFORMS[name]
    return kind(flag_fields.from_flags(kind.options_class))


def _start_faults(platform: Platform[Any]) -> list[str]:
    faults = []
    fields = {name: fields_of([each.options_class]) for name, each in PLATFORMS.items()}
    for name, text in flag_fields.given(flags.FLAGS, TABLES).items():
        readers = [each for each in PLATFORMS if name in fields[each]]
        if name not in fields_of([Choice, platform.options_class]):
            faults.append(f"{text}: needs {_one_of(readers)}")
    make = type(platform)
    return faults + flag_fields.all_faults(platform.options, lambda read: make(read).faults())


def _action_faults(words: Sequence[str], platform: Platform[Any]) -> list[str]:
    action = words[0]
    faults = platform.action_faults()
    if len(words) != 2:
        faults.append(f"{' '.join(words)}: must be {action} NAME, of one job")
    elif not re.fullmatch(NAME, words[1]):
        faults.append(f"{' '.join(words)}: no job can have that name")
    known = ["platform", *platform.action_flags, *(["follow"] if action == "logs" else [])]
    for name, text in flag_fields.given(flags.FLAGS, TABLES).items():
        readers = [each for each, kind in PLATFORMS.items() if name in kind.action_flags]
        if name not in known:
            needs = f"needs {_one_of(readers)}" if readers else f"{action} has no such flag"
            faults.append(f"{text}: {needs}")
    return faults


def _one_of(platforms: Sequence[str]) -> str:
    return " or ".join(f"--platform={name}" for name in platforms)


if __name__ == "__main__":
    flag_fields.define(TABLES)
    app.run(main, flags_parser=parse_flags)
