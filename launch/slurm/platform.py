"""Workers as tasks of a SLURM job."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from launch.platform import Platform
from launch.slurm import jobs, script
from launch.slurm.script import SlurmOptions


class Slurm(Platform[SlurmOptions]):
    """Workers as tasks of a SLURM job."""

    options_class = SlurmOptions
    actions: ClassVar[ModuleType] = jobs

    def faults(self) -> list[str]:
        return script.faults(self.options)

    def action_faults(self) -> list[str]:
        found = shutil.which("scontrol")
        return [] if found else ["--platform=slurm: there is no scontrol here"]

    def start(self, trainer_flags: Sequence[str]) -> int:
        options, command = self.options, self.trainer_command(trainer_flags)
        if options.dry_run:
            print(script.script(command, options, Path.cwd()), end="")
            return 0
        code, number = script.submit(command, options)
        if code == 0 and (options.wait or options.follow):
            code = jobs.follow(number, quietly=not options.follow)
        return code
