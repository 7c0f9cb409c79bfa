"""Workers on this machine: one process each, watched until all have ended.

Linux only: a worker asks the kernel (`PR_SET_PDEATHSIG`) to be killed when its launcher dies, so
that not even `kill -9` of the launcher leaves a worker behind. What a worker itself started is
killed with the worker's process group, except after such a `kill -9`.
"""

import ctypes
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
from collections.abc import Mapping, Sequence
from typing import BinaryIO

THREAD_VARIABLES = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
_PRINTING = threading.Lock()
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)
Worker = subprocess.Popen[bytes]


def run_local(command: Sequence[str], workers: int, grace_seconds: float = 5.0) -> int:
    """Starts `workers` processes of `command`, prints what they print, and waits for all of them.

    A worker's failure, SIGINT, SIGTERM or SIGHUP ends all: TERM at once, KILL `grace_seconds` later
    or at the second signal. It takes over the signals of the process; call it from the main thread.

    Returns the exit code: 0 if all were 0, else that of the worker that failed first (128 + n if
    signal n killed it), or 128 + n if signal n stopped the launcher.
    """
    watched = {signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        watched.remove(signal.SIGHUP)  # nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked signals wait until _supervise asks for them: no handler runs at an awkward moment, and
    # a terminal that blocks the printing threads cannot keep Ctrl-C from the workers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    processes: list[Worker] = []
    printers: list[threading.Thread] = []
    try:
        for additions in worker_environments(workers, os.environ):
            processes.append(_start(command, additions, mask))
        for index, process in enumerate(processes):
            arguments = (process.stdout, f"[worker {index}] " if workers > 1 else "")
            printers.append(threading.Thread(target=_print_lines, args=arguments, daemon=True))
            printers[-1].start()
        exit_code, summary = _supervise(processes, watched, grace_seconds)
    finally:
        for process in (each for each in processes if each.returncode is None):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for printer in printers:
        printer.join()
    for line in summary:
        _write(f"launch: {line}\n")
    return exit_code


def shell_commands(command: Sequence[str], workers: int) -> list[str]:
    """Returns one shell line a worker: what `run_local` would start, with its environment."""
    removed = [] if workers > 1 else ["-u", "TF_CONFIG"]
    return [
        shlex.join(["env", *removed, *(f"{k}={v}" for k, v in additions.items()), *command])
        for additions in worker_environments(workers, os.environ)
    ]


def worker_environments(workers: int, inherited: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns, for each worker, the variables to add to the `inherited` environment.

    The processor's cores are divided among the workers; a thread variable that is in `inherited`
    stays as it is. Two or more also get TensorFlow's `TF_CONFIG`, with ports free a moment ago.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    defaults = {name: str(threads) for name in THREAD_VARIABLES} | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    common = {name: value for name, value in defaults.items() if name not in inherited}
    common["PYTHONUNBUFFERED"] = "1"
    if workers == 1:
        return [common]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in _free_ports(workers)]}
    tasks = [{"type": "worker", "index": index} for index in range(workers)]
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": t}), **common} for t in tasks]


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

    inherited = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
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
    """Prints each line whole; each state of a line that `\\r` redraws is a line of its own."""
    with io.TextIOWrapper(pipe, encoding="utf-8", errors="replace", newline="") as lines:
        for line in lines:
            if line != "\r":  # it starts a redrawn line, shows nothing itself
                with _PRINTING:
                    _write(prefix + line.rstrip("\r\n") + "\n")


def _write(text: str) -> None:
    try:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    except OSError as error:
        # Go on emptying the pipe, for workers that print while they stop must not block.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGPIPE)
        try:
            print(f"launch: cannot print the workers' lines: {error}", file=sys.stderr, flush=True)
        except OSError:
            # What is left in its buffer would fail again at exit and change the exit code to 120.
            os.dup2(nowhere, sys.stderr.fileno())


def _supervise(
    processes: Sequence[Worker], watched: set[signal.Signals], grace_seconds: float
) -> tuple[int, list[str]]:
    """Waits for all; returns the exit code and the last lines (printing here could block)."""
    running = list(processes)
    failed: Worker | None = None  # the first
    stop_signal: int | None = None  # the first
    terminated = False
    kill_time = math.inf
    while running:
        timeout = min(max(0.0, kill_time - time.monotonic()), threading.TIMEOUT_MAX)
        info = signal.sigtimedwait(watched, timeout)
        received = info and info.si_signo
        if received == signal.SIGCHLD:
            for process in [each for each in running if _has_ended(each)]:
                running.remove(process)
                if process.returncode != 0 and not (failed or stop_signal):
                    failed = process
        elif received is None or (stop_signal and received in (signal.SIGINT, signal.SIGTERM)):
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
            kill_time = math.inf
        else:
            stop_signal = stop_signal or received
        if (failed or stop_signal) and not terminated:
            terminated = True
            kill_time = time.monotonic() + grace_seconds
            for process in running:
                os.killpg(process.pid, signal.SIGTERM)
    summary = [
        f"worker {index} did not stop on TERM and was killed"
        for index, process in enumerate(processes)
        if process.returncode == -signal.SIGKILL and process is not failed
    ]
    if failed:
        code, ending = failed.returncode, f"exited with code {failed.returncode}"
        if code < 0:
            ending = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        summary.append(f"worker {processes.index(failed)} {ending}")
        return (code if code > 0 else 128 - code), summary
    if stop_signal:
        return 128 + stop_signal, [*summary, f"stopped by {signal.Signals(stop_signal).name}"]
    return 0, []


def _has_ended(process: Worker) -> bool:
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    # Whatever the worker left running goes too. Until wait(), the group's number is still its own.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True
