"""Runs the tasks of `prepare` with Apache Spark: the extra warmstate[spark].

Results are files, so all executors must see --out and the source's files under the same paths, and
have warmstate installed. A task whose executor is lost runs again on another one; if both are still
alive, both write the same bytes.
"""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.errors import InputError

SPARK = "spark"  # the value of --runner


def spark_faults(options: str) -> list[str]:
    """Returns the faults of --runner=spark and its --runner_options, without importing Spark."""
    needs = f"--runner={SPARK} needs"
    if importlib.util.find_spec("pyspark") is None:
        return [f"{needs} PySpark: pip install 'warmstate[spark]'; see docs/data-preparing.md"]
    if not os.environ.get("JAVA_HOME") and not shutil.which("java"):
        return [f"{needs} Java 17 or newer: set JAVA_HOME, or put java in PATH"]
    try:
        words = shlex.split(options)
    except ValueError as error:
        return [f"--runner_options={options}: {error}"]
    wrong = [word for word in words if not (word.startswith("spark.") and "=" in word)]
    return [f"--runner_options: {word} is not a property spark.NAME=VALUE" for word in wrong]


class SparkRunner:
    """A runner (see `runners`) that starts an application for each call.

    Args:
        options: Spark's properties, as NAME=VALUE between spaces. Without them spark-defaults.conf
            counts, and else all cores of this machine.
    """

    def __init__(self, options: str) -> None:
        given = (word.partition("=") for word in shlex.split(options))
        self._properties = {
            "spark.app.name": "warmstate prepare",
            "spark.executorEnv.CUDA_VISIBLE_DEVICES": "-1",  # text needs no GPU
            **{name: value for name, _, value in given},
        }

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
        from pyspark import SparkConf, SparkContext

        def do(task: Any) -> list[str]:
            try:
                function(task, lambda documents: None)
            except InputError as error:  # Spark would repeat a task that raises
                return [str(error)]
            return []

        if not tasks:
            return
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # of the executors
        with SparkContext(conf=SparkConf().setAll([*self._properties.items()])) as context:
            faults = context.parallelize(list(tasks), len(tasks)).flatMap(do).collect()
        if faults:
            raise InputError(faults[0])
