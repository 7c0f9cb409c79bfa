"""Runs the tasks of `prepare` in this process, or in several processes of this machine.

A runner takes a function, its tasks and a `Progress`, calls function(task, count) for each task, in
any order, and returns when all are done. Results are files.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any

PROGRESS_SECONDS = 2.0

Count = Callable[[int], None]
Function = Callable[[Any, Count], None]


class Progress:
    """Prints the number of finished documents, at most every PROGRESS_SECONDS.

    Args:
        parts: number of parts.
        log: takes a line.
    """

    def __init__(self, parts: int, log: Callable[[str], None]) -> None:
        self._parts, self._parts_done = parts, 0
        self._log = log
        self._begin = self._printed = time.monotonic()

    def finished(self, parts: int = 1) -> None:
        """Counts finished parts."""
        self._parts_done += parts

    def show(self, documents: int) -> None:
        """Prints a line if it is time; `documents` are done in total."""
        now = time.monotonic()
        if not documents or now - self._printed < PROGRESS_SECONDS:
            return
        self._printed = now
        seconds = now - self._begin
        left = ""
        if self._parts_done:
            seconds_left = seconds / self._parts_done * (self._parts - self._parts_done)
            left = f", about {seconds_left:.0f} s left"
        self._log(
            f"prepare: {documents:,} documents, {self._parts_done} of {self._parts} parts, "
            f"{documents / seconds:,.0f} documents/s{left}"
        )


class WorkerDiedError(RuntimeError):
    """A worker process ended before its task did."""


def run_here(function: Function, tasks: Sequence[Any], progress: Progress) -> None:
    """Does all tasks in this process, in order."""
    documents = 0

    def count(more: int) -> None:
        nonlocal documents
        documents += more
        progress.show(documents)

    for task in tasks:
        function(task, count)
        progress.finished()


class Processes:
    """A runner that uses several processes of this machine.

    They are forked from a server process that has only imported TensorFlow, so the state of this
    process does not matter. They end when it ends, even if it is killed.

    Args:
        processes: number of processes.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["data_pipelines.prepare.worker_imports"])

    def __call__(self, function: Function, tasks: Sequence[Any], progress: Progress) -> None:
        """Does all tasks.

        Raises:
            WorkerDiedError: a process was killed, perhaps for want of memory.
            Exception: the first error of a task; tasks that have not begun are dropped.
        """
        if not tasks:
            return
        documents = self._context.Value("q", 0)
        arguments = (function, documents)
        processes = min(self._processes, len(tasks))
        with ProcessPoolExecutor(processes, self._context, _start_worker, arguments) as pool:
            try:
                waiting = {pool.submit(_do, task) for task in tasks}
                while waiting:
                    done, waiting = wait(waiting, PROGRESS_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    progress.finished(len(done))
                    progress.show(documents.value)
            except BrokenProcessPool as error:
                raise WorkerDiedError(
                    "prepare: a worker process was killed, perhaps for want of memory; run the "
                    "same command again, with fewer --processes: finished parts are kept"
                ) from error
            finally:
                # Waits: a worker that starts after this process has ended would print a traceback.
                pool.shutdown(wait=True, cancel_futures=True)


_function: Function  # both are set by `_start_worker`
_documents: Any


def _start_worker(function: Function, documents: Any) -> None:
    global _function, _documents
    _function, _documents = function, documents
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # text needs no GPU
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # it was started by one
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


def _do(task: Any) -> None:
    def count(more: int) -> None:
        with _documents.get_lock():
            _documents.value += more

    _function(task, count)


def runner_for(processes: int, tasks: int) -> Callable[[Function, Sequence[Any], Progress], None]:
    """Returns the runner for a machine.

    Args:
        processes: the flag's value; 0 means one a core.
        tasks: number of tasks, which is the most useful number of processes.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), tasks)
    return run_here if processes <= 1 else Processes(processes)
