"""What the launcher needs from a platform: flags, faults, start, status, logs, cancel.

A new platform is a folder with a subclass of `Platform`, and a line in main.py.
"""

import abc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Generic, TypeVar

from data_pipelines.flag_fields import flag

NAME = "[A-Za-z0-9][A-Za-z0-9_.-]*"


@dataclass(frozen=True)
class Options:
    """Flags of every platform."""

    # fmt: off
    workers: int | None = flag("Start", None, "Number of trainer processes. Default: 1; with "
        "--elastic: --max_workers.", at_least=1)
    distributor: str = flag("Start", "auto", "How workers find each other. auto: TF_CONFIG or the "
        "platform's own variables.", choices=("auto", "horovod"))
    max_restarts: int | None = flag("Start", None, "Number of times that all workers are restarted "
        "from the last checkpoint after a failure. Default: 0; on k8s: 3. With --elastic: number "
        "of lost workers to survive; default: any.", at_least=0)
    name: str | None = flag("Start", None, "Name of the job, for status, logs and cancel. Default: "
        "warmstate; on this machine: none. A named local job is recorded in local-jobs/.")
    dry_run: bool = flag("Start", False, "Print what would be started, and start nothing.")
    # fmt: on

    @property
    def with_horovod(self) -> bool:
        """Whether Horovod connects the workers."""
        return self.distributor == "horovod"


@dataclass(frozen=True)
class ElasticOptions(Options):
    """Flags of platforms whose jobs can change their number of workers."""

    # fmt: off
    elastic: bool = flag("Elastic", False, "Continue with one worker fewer after a failure, and "
        "with more workers when more are allowed.")
    min_workers: int | None = flag("Elastic", None, "Number of workers below which an elastic job "
        "ends.", at_least=1)
    max_workers: int | None = flag("Elastic", None, "Largest number of workers of an elastic job.",
        at_least=1)
    # fmt: on

    def elastic_faults(self) -> list[str]:
        """Returns one line for each flag that contradicts --elastic, or needs it."""
        limits = {"min_workers": self.min_workers, "max_workers": self.max_workers}
        if not self.elastic:
            return [f"--{k}={v}: needs --elastic" for k, v in limits.items() if v is not None]
        faults = [f"--elastic: needs --{name}" for name, value in limits.items() if value is None]
        if self.min_workers is None or self.max_workers is None:
            return faults
        between = f"--min_workers={self.min_workers} and --max_workers={self.max_workers}"
        if self.min_workers > self.max_workers:
            faults.append(f"{between}: the first must not be above the second")
        elif not self.min_workers <= (self.workers or self.max_workers) <= self.max_workers:
            faults.append(f"--workers={self.workers}: must be between {between}")
        return faults


@dataclass(frozen=True)
class ClusterOptions(Options):
    """Flags of platforms that run a job somewhere else."""

    # fmt: off
    gpus_per_worker: int | None = flag("Cluster (slurm, k8s)", None, "Number of GPUs for each "
        "worker.", at_least=1)
    wait: bool = flag("Cluster (slurm, k8s)", False, "Wait until the job has ended, and exit "
        "with its exit code.")
    follow: bool = flag("Cluster (slurm, k8s)", False, "Like --wait, and also print the chief's "
        "output and fetch the report.")
    # fmt: on


OptionsType = TypeVar("OptionsType", bound=Options)


class Platform(abc.ABC, Generic[OptionsType]):
    """A place to start trainers.

    Attributes:
        options_class: The flags that the platform reads.
        action_flags: Those of them that status, logs and cancel read.
        actions: The module whose functions status, logs and cancel do so.
    """

    options_class: ClassVar[type[Options]]
    actions: ClassVar[ModuleType]
    action_flags: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: OptionsType):
        self.options = options

    @abc.abstractmethod
    def faults(self) -> list[str]:
        """Returns one line for each reason why the job cannot be started."""

    @abc.abstractmethod
    def start(self, trainer_flags: Sequence[str]) -> int:
        """Starts the job, or prints it with --dry_run; returns the exit code."""

    def action_faults(self) -> list[str]:
        """Returns one line for each reason why status, logs and cancel cannot work here."""
        return []

    def status(self, name: str) -> int:
        """Prints the state of the job; returns 1 if there is no job of that name, else 0."""
        return self.actions.status(name)

    def logs(self, name: str, follow: bool) -> int:
        """Prints the log of the job, with `follow` until the job ends; returns the exit code."""
        return self.actions.logs(name, follow)

    def cancel(self, name: str) -> int:
        """Stops the job, whose workers save their state first; returns the exit code."""
        return self.actions.cancel(name)

    def trainer_command(self, trainer_flags: Sequence[str]) -> list[str]:
        """Returns the command of each worker, for platforms that share this Python."""
        chosen = ["--distributor=horovod"] if self.options.with_horovod else []
        return [sys.executable, "-u", "-m", "trainer.main", *chosen, *trainer_flags]
