"""Workers on this machine: one process each, supervised until all have ended.

Linux only: a worker asks the kernel (`PR_SET_PDEATHSIG`) to kill it when its launcher dies, so that
even `kill -9` of the launcher leaves no worker behind. Processes that a worker has started are
killed with its process group, except after such a `kill -9`.
"""

import contextlib
import ctypes
import functools
import io
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipelines.errors import LOST_WORKER_EXIT_CODE, PREEMPTED_EXIT_CODE, USAGE_EXIT_CODE
from launch.local import gpus, horovod, loopback, screen

THREAD_VARIABLES = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
_BLAME_SECONDS = 3.0  # from the first lost peer until surviving workers are declared hung
_LOOK_SECONDS = 0.5  # between two looks at the workers, and two calls of `asks_stop`
_PRINTING = threading.Lock()
_COPIES: list[BinaryIO] = []  # of what is printed
_SCREEN = screen.Screen()
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)
Worker = subprocess.Popen[bytes]
Say = Callable[[str], object]  # prints a line; the result is not used


@dataclass(frozen=True)
class Ending:
    """How workers that were started together ended."""

    exit_code: int  # 0 if all were 0
    lines: list[str]  # lines to print; the last names the worker at fault
    stopped: bool = False  # whether a signal to the launcher ended them
    asked: bool = False  # whether `asks_stop` ended them before they were done

    @property
    def is_final(self) -> bool:
        """Whether a restart is useless: the job is done, misconfigured or stopped."""
        return self.exit_code in (0, USAGE_EXIT_CODE) or self.stopped


def run_local(
    command: Sequence[str],
    workers: int,
    grace_seconds: float = 5.0,
    max_restarts: int = 0,
    with_horovod: bool = False,
) -> int:
    """Starts `workers` processes of `command`, prints their lines, and waits for all of them.

    A worker's failure, SIGINT, SIGTERM or SIGHUP ends all: TERM at once, KILL `grace_seconds` later
    or at the second signal. Call it from the main thread, because it handles the process's signals.

    Args:
        max_restarts: The number of restarts of all workers after a failure other than a
            configuration error (exit code 2). The command must resume by itself.
        with_horovod: Whether Horovod's variables and a rendezvous server connect the workers, in
            place of TF_CONFIG.

    Returns:
        The exit code: 0 if all were 0, else that of the worker at fault (128 + n if signal n killed
        it), or 128 + n if signal n stopped the launcher. At fault is the first worker that failed
        with another code than 75, which tells of a lost peer. If there is none, surviving workers
        are declared hung.
    """
    restarts = 0
    while True:
        ending = run_together(command, workers, grace_seconds, with_horovod)
        readable = say(*ending.lines)
        if max_restarts == 0 or ending.is_final or not readable:
            return ending.exit_code
        if restarts == max_restarts:
            say(f"gave up after {restarts} restarts")
            return ending.exit_code
        restarts += 1
        say(f"restart {restarts} of {max_restarts}")


def run_together(
    command: Sequence[str],
    workers: int,
    grace_seconds: float,
    with_horovod: bool,
    asks_stop: Callable[[Say], bool] | None = None,
) -> Ending:
    """Starts workers once, prints their lines, and returns how they ended; see `run_local`.

    Args:
        asks_stop: Called twice a second while nothing is wrong; True ends the workers, as a signal
            would. Its argument prints a line without waiting for it.
    """
    watched = {signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        watched.remove(signal.SIGHUP)  # nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked signals wait until _Supervision asks for them: no handler runs at an awkward moment,
    # and a terminal that blocks the printing threads cannot keep Ctrl-C from the workers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    processes: list[Worker] = []
    printers: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        stack.callback(_end, processes)
        rendezvous = horovod.Rendezvous(workers) if with_horovod else None
        port = rendezvous.port if rendezvous else None
        preloaded = None
        if workers > 1 and not with_horovod:
            preloaded, warning = stack.enter_context(loopback.library())
            if warning:
                say(warning)
        columns = screen.columns()
        for additions in worker_environments(workers, os.environ, port, preloaded):
            if columns and not processes:  # the first speaks for all
                additions |= {screen.COLUMNS_VARIABLE: str(columns)}
            processes.append(_start(command, additions, mask))
        if rendezvous:
            stack.enter_context(rendezvous.serving())
        for index, process in enumerate(processes):
            prefix = f"[worker {index}] " if workers > 1 else ""
            printers.append(_in_thread(_print_lines, process.stdout, prefix))
        look = asks_stop and functools.partial(
            asks_stop, lambda line: printers.append(_in_thread(say, line))
        )
        ending = _Supervision(processes, grace_seconds, look).wait(watched)
    for printer in printers:
        printer.join()
    with _PRINTING:
        _put(_SCREEN.live(""))
    return ending


def shell_commands(command: Sequence[str], workers: int, with_horovod: bool = False) -> list[str]:
    """Returns one shell line a worker: what `run_local` would start, with its environment.

    With Horovod they need the launcher's rendezvous server, for whose port stands 0.
    """
    lines = []
    for additions in worker_environments(workers, os.environ, 0 if with_horovod else None):
        foreign = [name for name in horovod.VARIABLES if name in os.environ]
        removed = [name for name in ("TF_CONFIG", *foreign) if name not in additions]
        unset = [word for name in removed for word in ("-u", name)]
        lines.append(
            shlex.join(["env", *unset, *(f"{k}={v}" for k, v in additions.items()), *command])
        )
    return lines


def worker_environments(
    workers: int,
    inherited: Mapping[str, str],
    rendezvous_port: int | None = None,
    preloaded: Path | None = None,
) -> list[dict[str, str]]:
    """Returns, for each worker, the variables to add to the `inherited` environment.

    The processor's cores are divided among the workers; a thread variable that is in `inherited`
    stays as it is. With a `rendezvous_port` they get Horovod's variables; else two or more get
    TensorFlow's `TF_CONFIG`, with ports free a moment ago, a share of the GPUs, and preload the
    library of loopback.py from `preloaded`. Horovod's choose a GPU themselves.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    defaults = {name: str(threads) for name in THREAD_VARIABLES}
    common = {name: value for name, value in defaults.items() if name not in inherited}
    common["PYTHONUNBUFFERED"] = "1"
    if rendezvous_port is not None:
        places = horovod.worker_environments(workers, rendezvous_port)
        return [place | common for place in places]
    if workers == 1:
        return [common]
    ports = _free_ports(workers)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    environments = []
    for index, (port, share) in enumerate(zip(ports, gpus.shares(workers, inherited), strict=True)):
        task = {"type": "worker", "index": index}
        variables = {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task}), **common, **share}
        if preloaded:
            variables |= loopback.variables(preloaded, port, inherited)
        environments.append(variables)
    return environments


def _free_ports(count: int) -> list[int]:
    # All are open at once, so no port comes twice.
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start(command: Sequence[str], additions: dict[str, str], mask: set[int]) -> Worker:
    launcher = os.getpid()

    def die_with_launcher() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != launcher:  # it died before the kernel knew
            os._exit(1)

    foreign = ("TF_CONFIG", *horovod.VARIABLES)
    inherited = {name: value for name, value in os.environ.items() if name not in foreign}
    return subprocess.Popen(
        command,
        env=inherited | additions,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_launcher,  # safe: this process has no other thread yet
    )


def _print_lines(pipe: BinaryIO, prefix: str) -> None:
    r"""Prints whole lines; each state of a line that `\r` redraws becomes a line.

    The states of a live line (see screen.py) are shown in one place.
    """
    with io.TextIOWrapper(pipe, encoding="utf-8", errors="replace", newline="") as lines:
        for line in lines:
            if (text := screen.live_text(line)) is not None:
                with _PRINTING:
                    _put(_SCREEN.live(text))
                continue
            line = line.replace(screen.ERASE, "")  # of the live line before
            if line not in ("", "\r"):  # it starts a redrawn line, shows nothing itself
                with _PRINTING:
                    _write(prefix + line.rstrip("\r\n") + "\n")


def _in_thread(function: Callable[..., object], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def say(*lines: str) -> bool:
    """Prints lines of the launcher; returns False if nobody reads them."""
    with _PRINTING:
        return all([_write(f"launch: {line}\n") for line in lines])


@contextlib.contextmanager
def lines_copied_to(file: BinaryIO) -> Iterator[None]:
    """Copies all that is printed into the unbuffered `file`, until the block or a write fails."""
    _COPIES.append(file)
    try:
        yield
    finally:
        if file in _COPIES:
            _COPIES.remove(file)


def _write(text: str) -> bool:
    """Prints whole lines; returns False if nobody reads them."""
    for copy in list(_COPIES):
        try:
            copy.write(text.encode())
        except OSError as error:  # the job is worth more than its log
            _COPIES.remove(copy)
            with contextlib.suppress(OSError):
                print(f"launch: {copy.name}: {error.strerror}", file=sys.stderr, flush=True)
    return _put(_SCREEN.line(text))


def _put(text: str) -> bool:
    """Writes `text` to standard output; returns False if nobody reads it."""
    try:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
        return True
    except OSError as error:
        # Keep emptying the pipes: workers that print while they stop must not block.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGPIPE)
        try:
            print(f"launch: cannot print the workers' lines: {error}", file=sys.stderr, flush=True)
        except OSError:
            # What is left in its buffer would fail again at exit and change the exit code to 120.
            os.dup2(nowhere, sys.stderr.fileno())
        return False


class _Supervision:
    """Waits until all workers have ended. It prints nothing, because that could block."""

    def __init__(
        self,
        processes: Sequence[Worker],
        grace_seconds: float,
        asks_stop: Callable[[], bool] | None,
    ):
        self._processes = processes
        self._grace_seconds = grace_seconds
        self._asks_stop = asks_stop
        self._running = list(processes)
        self._failed: Worker | None = None  # the first that did not just lose a peer
        self._lost: Worker | None = None  # the first that lost a peer
        self._hung: list[Worker] = []
        self._stop_signal: int | None = None  # the first
        self._asked = False  # whether `asks_stop` ended them
        self._terminated = False
        self._kill_time = math.inf

    def wait(self, watched: set[signal.Signals]) -> Ending:
        """Handles the `watched` signals until all workers have ended."""
        while self._running:
            info = signal.sigtimedwait(watched, self._timeout_seconds())
            received = info and info.si_signo
            if received in (None, signal.SIGCHLD):
                self._note_ended()
            if received is None:
                self._do_what_is_due()
            elif self._stop_signal and received in (signal.SIGINT, signal.SIGTERM):
                self._kill_running()
            elif received != signal.SIGCHLD:
                self._stop_signal = self._stop_signal or received
            self._stop_if_needed()
        return self._ending()

    def _do_what_is_due(self) -> None:
        if time.monotonic() >= self._kill_time:
            self._kill_running()
        elif self._asks_stop and self._all_is_well():
            self._asked = self._asks_stop()

    def _timeout_seconds(self) -> float:
        # A worker's end is not only told by SIGCHLD: in a program with other threads, one of them
        # may take the signal while this one does something else.
        return min(max(0.0, self._kill_time - time.monotonic()), _LOOK_SECONDS)

    def _all_is_well(self) -> bool:
        """Returns whether to call `asks_stop`: nothing else is ending the workers."""
        return bool(self._running) and not (self._terminated or self._lost or self._hung)

    def _note_ended(self) -> None:
        for process in [each for each in self._running if _has_ended(each)]:
            self._running.remove(process)
            code = process.returncode
            # A worker that is asked to stop may fail by that, but not by a configuration error.
            expected = self._asked and code != USAGE_EXIT_CODE
            if code == LOST_WORKER_EXIT_CODE:
                self._lost = self._lost or process
            elif code and not (self._failed or self._stop_signal or self._hung or expected):
                self._failed = process

    def _kill_running(self) -> None:
        known = self._failed or self._stop_signal or self._asked
        self._hung = [] if known else list(self._running)
        _kill(self._running)
        self._kill_time = math.inf

    def _stop_if_needed(self) -> None:
        if (self._failed or self._stop_signal or self._asked) and not self._terminated:
            self._terminated = True
            self._kill_time = time.monotonic() + self._grace_seconds
            if self._failed and self._failed.returncode == PREEMPTED_EXIT_CODE:
                return  # TERM to one stops all; a second TERM would end workers that still save
            for process in self._running:
                os.killpg(process.pid, signal.SIGTERM)
        elif self._lost and not (self._terminated or self._hung) and self._kill_time == math.inf:
            self._kill_time = time.monotonic() + _BLAME_SECONDS

    def _ending(self) -> Ending:
        number = self._processes.index
        lines = [
            f"worker {index} did not stop on TERM and was killed"
            for index, process in enumerate(self._processes)
            if process.returncode == -signal.SIGKILL
            and process is not self._failed
            and process not in self._hung
        ]
        if self._failed:
            code, how = self._failed.returncode, f"exited with code {self._failed.returncode}"
            if code < 0:
                how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            lines.append(f"worker {number(self._failed)} {how}")
            return Ending(code if code > 0 else 128 - code, lines)
        if self._stop_signal:
            lines.append(f"stopped by {signal.Signals(self._stop_signal).name}")
            return Ending(128 + self._stop_signal, lines, stopped=True)
        if self._asked and any(process.returncode for process in self._processes):
            return Ending(PREEMPTED_EXIT_CODE, lines, asked=True)
        lines += [
            f"worker {number(process)} hung: worker {number(self._lost)} waited for it "
            "until the timeout; it was killed"
            for process in self._hung
        ]
        if self._lost and not self._hung:
            lines.append(f"worker {number(self._lost)} lost a peer, and so did all that failed")
        return Ending(LOST_WORKER_EXIT_CODE if self._lost else 0, lines)


def _kill(processes: Sequence[Worker]) -> None:
    """Kills the workers that have not been waited for, with all that they started."""
    for process in (each for each in processes if each.returncode is None):
        os.killpg(process.pid, signal.SIGKILL)


def _end(processes: Sequence[Worker]) -> None:
    _kill(processes)
    for process in processes:
        process.wait()


def _has_ended(process: Worker) -> bool:
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    # Processes that the worker left behind end too. Until wait(), nobody else gets its number.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True
