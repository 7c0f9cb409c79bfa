"""Runs the tasks of `prepare` with Apache Beam: the extra warmstate[beam].

Results are files, so all of Beam's workers must see --out and the source's files under the same
paths, and have warmstate installed.
"""

import importlib.util
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.errors import InputError

RUNNERS = ("DirectRunner", "FlinkRunner", "SparkRunner", "DataflowRunner")
INSTALL = "pip install 'apache-beam>=2.77,<3' in a separate virtual environment"


def beam_faults(runner: str, options: str) -> list[str]:
    """Returns the faults of --runner and --runner_options, without importing Beam."""
    if not runner:
        return [f"--runner_options={options} needs --runner"] if options else []
    if runner not in RUNNERS:
        return [f"--runner={runner} is not spark, and none of {', '.join(RUNNERS)}"]
    if importlib.util.find_spec("apache_beam") is None:
        return [f"--runner={runner} needs Apache Beam: {INSTALL}; see docs/data-preparing.md"]
    try:
        shlex.split(options)
    except ValueError as error:
        return [f"--runner_options={options}: {error}"]
    return []


class BeamRunner:
    """A runner (see `runners`) that starts a pipeline for each call.

    Args:
        runner: one of `RUNNERS`.
        options: flags of Beam and of its runner, as on a command line.
    """

    def __init__(self, runner: str, options: str) -> None:
        self._arguments = [f"--runner={runner}", *shlex.split(options)]

    def __call__(
        self,
        function: Callable[[Any, Callable[[int], None]], None],
        tasks: Sequence[Any],
        progress: Any,
    ) -> None:
        """Runs all tasks and waits until they are done.

        Raises:
            InputError: the first one that a task raised.
        """
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        def do(task: Any) -> list[str]:
            try:
                function(task, lambda documents: None)
            except InputError as error:
                raise RuntimeError(f"{_MARK}{error}{_MARK}") from error
            return []

        if not tasks:
            return
        try:
            with beam.Pipeline(options=PipelineOptions(self._arguments)) as pipeline:
                # Without the shuffle a runner may run all tasks in one worker.
                _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.FlatMap(do)
        except Exception as error:
            # Runners wrap the errors of tasks in other errors, as text.
            _, *found = str(error).split(_MARK)
            if found:
                raise InputError(found[0]) from error
            raise


_MARK = "[InputError]"
