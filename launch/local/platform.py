"""Workers on this machine."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from data_pipelines.errors import USAGE_EXIT_CODE
from data_pipelines.flag_fields import flag
from launch.local import elastic, gpus, horovod, jobs, workers
from launch.platform import ElasticOptions, Platform


@dataclass(frozen=True)
class LocalOptions(ElasticOptions):
    """Flags of --platform=local."""

    # fmt: off
    available_workers: str | None = flag("Local", None, "File with the number of workers that an "
        "elastic job may have now. The job follows every change; without the file it may have "
        "--max_workers.")
    grace_seconds: float = flag("Local", 5.0, "Time from TERM to KILL when workers are stopped.",
        at_least=0)
    # fmt: on

    @property
    def available_file(self) -> Path | None:
        """--available_workers as a path."""
        return Path(self.available_workers) if self.available_workers is not None else None


class Local(Platform[LocalOptions]):
    """Workers as processes of this machine."""

    options_class = LocalOptions
    actions: ClassVar[ModuleType] = jobs

    def faults(self) -> list[str]:
        options, faults = self.options, self.action_faults() + self.options.elastic_faults()
        if options.with_horovod and not horovod.is_installed():
            faults.append(
                "--distributor=horovod: Horovod is not installed; `make horovod` builds it"
            )
        if not options.dry_run:
            faults += gpus.faults(options.workers or 1, os.environ)
        if options.name is not None and not options.dry_run:
            faults += jobs.faults(options.name)
        if file := options.available_file:
            if not options.elastic:
                faults.append(f"--available_workers={file}: needs --elastic")
            elif file.is_dir() or not file.parent.is_dir():
                faults.append(f"--available_workers={file}: must be a file in a folder that exists")
        return faults

    def action_faults(self) -> list[str]:
        if sys.platform == "linux":
            return []
        return [f"--platform=local: needs Linux, this is {sys.platform}"]

    def start(self, trainer_flags: Sequence[str]) -> int:
        options, command = self.options, self.trainer_command(trainer_flags)
        count = options.workers or options.max_workers or 1
        if options.dry_run:
            if options.with_horovod:
                print("# These need the launcher's rendezvous server, for whose port stands 0.")
            lines = workers.shell_commands(command, count, options.with_horovod)
            for index, line in enumerate(lines):
                print(f"# worker {index}\n{line}")
            return 0
        if options.name is None:
            return self._run(command, count)
        with jobs.recorded(options.name, command, count) as job:
            job.exit_code = self._run(command, count)
        return job.exit_code

    def _run(self, command: Sequence[str], count: int) -> int:
        options = self.options
        grace_seconds, with_horovod = options.grace_seconds, options.with_horovod
        if note := gpus.note(count, os.environ) if not with_horovod else "":
            workers.say(note)
        try:
            if not options.elastic:
                restarts = options.max_restarts or 0
                return workers.run_local(command, count, grace_seconds, restarts, with_horovod)
            limits = elastic.Limits(
                minimum=options.min_workers or 1,
                maximum=options.max_workers or 1,
                start=options.workers,
                available_file=options.available_file,
                max_losses=options.max_restarts,
            )
            return elastic.run_elastic(command, limits, grace_seconds, with_horovod)
        except OSError as error:  # too many processes, ports or open files
            workers.say(f"--workers={count}: cannot be started: {error.strerror}; start fewer")
            return USAGE_EXIT_CODE
