"""Python programs as processes that are forked where TensorFlow is imported already.

A start of the trainer takes seconds, nearly all of them the import of TensorFlow. So one server
process imports it, runs nothing of it (its threads would not survive a fork), and forks: what is
forked becomes `python -m MODULE` or `python -c CODE` with the arguments, environment, folder and
output that were asked for, a process like any other. Where such a process starts Python itself, as
the launcher does its workers, it forks too; the started process is its child, as it should be.

What differs from a start by exec: variables that libraries read when they are imported have the
values of the test run, and hashes of strings are salted alike. `EXEC=1` starts all by exec instead:
`make test-all` does.
"""

import atexit
import contextlib
import functools
import gc
import io
import json
import multiprocessing.util
import os
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

import numpy
from absl import flags

from launch.local import loopback

REPOSITORY = Path(__file__).resolve().parents[1]

PATH_VARIABLE = "WARMSTATE_TESTS_FORK_SERVER"
PRELOADED = ("tensorflow", "keras", "absl.app", "safetensors.numpy", "yaml")
PRODUCT = ("data_pipelines", "launch", "trainer", "warmstate", "tests")  # imported anew
_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 16
_SPAWN = multiprocessing.util.spawnv_passfds


def is_python(command: Sequence[str]) -> bool:
    """Returns whether `command` starts this Python with a module or with code."""
    words = [str(word) for word in command]
    return words[:1] == [sys.executable] and _words(words)[1:2] in (["-m"], ["-c"])


def _words(command: Sequence[str]) -> list[str]:
    return [command[0], *command[2:]] if command[1:2] == ["-u"] else list(command)


# --- Becoming another program ---------------------------------------------------------------------


def become(request: Mapping[str, Any]) -> NoReturn:
    """Makes this process, which has been forked, the one that is asked for."""
    code = 1
    try:
        _reset(request["environment"], request["folder"])
        code = _run(request["command"])
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _reset(environment: Mapping[str, str], folder: str) -> None:
    """Undoes what was set for the program that forked: signals, variables, modules, flags."""
    gc.freeze()  # what the other program left is not this one's to clean up
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for name in sys.modules.keys() - _Pristine.modules:
        del sys.modules[name]
    atexit._clear()
    for name in set(flags.FLAGS) - _Pristine.flags:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    flags.FLAGS.set_gnu_getopt(False)
    numpy.random.seed()


class _Pristine:
    """What there is before any program has run."""

    modules: ClassVar[set[str]] = set()
    flags: ClassVar[set[str]] = set()
    path: ClassVar[list[str]] = []

    @classmethod
    def note(cls) -> None:
        cls.modules, cls.flags = set(sys.modules), set(flags.FLAGS)
        cls.path = [entry for entry in sys.path[1:] if entry not in _python_path(os.environ)]


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _run(command: Sequence[str]) -> int:
    """Runs a module or code as `python` would; returns the exit code."""
    words = _words(command)
    _open_standard_streams(len(words) < len(command) or bool(os.environ.get("PYTHONUNBUFFERED")))
    sys.argv = [words[1], *words[3:]]
    sys.orig_argv = list(words)
    sys.path[:] = [os.getcwd() if words[1] == "-m" else "", *_python_path(os.environ)]
    sys.path += _Pristine.path
    sys.path_importer_cache.clear()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    subprocess.Popen = _ForkingPopen
    multiprocessing.util.spawnv_passfds = _fork_a_server
    code: object = 0
    try:
        _customize()
        if words[1] == "-m":
            runpy._run_module_as_main(words[2])
        else:
            exec(compile(words[2], "<string>", "exec"), main.__dict__)
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    return _finish(code)


def _customize() -> None:
    """Does what `site` did for the server: runs the sitecustomize that PYTHONPATH adds."""
    if any((Path(entry) / "sitecustomize.py").exists() for entry in _python_path(os.environ)):
        sys.modules.pop("sitecustomize", None)
        import sitecustomize  # noqa: F401
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage

        coverage.process_startup()


def _finish(code: object) -> int:
    """Ends the program as the interpreter does: threads, exit handlers, buffers."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        return 120
    return (code or 0) & 0xFF


def _open_standard_streams(unbuffered: bool) -> None:
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = sys.__stdout__ = _writer(1, unbuffered, line_buffering=os.isatty(1))
    sys.stderr = sys.__stderr__ = _writer(2, unbuffered, line_buffering=True)


def _writer(fd: int, unbuffered: bool, line_buffering: bool) -> IO[str]:
    raw = io.FileIO(fd, "wb", closefd=False)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding="utf-8",
        errors="backslashreplace" if fd == 2 else "strict",
        line_buffering=line_buffering,
        write_through=unbuffered,
    )


def _close_all_but(kept: Sequence[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


class Popen(subprocess.Popen):
    """A `subprocess.Popen` whose process is forked, by the server, if it is to run Python."""

    _connection: socket.socket | None = None
    cpu_seconds = 0.0  # of all that have ended

    def _execute_child(self, args, executable, *more):  # as in CPython 3.11 to 3.13
        (
            preexec_fn, _close_fds, pass_fds, cwd, env, _startupinfo, _creationflags, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
            _restore_signals, _gid, _gids, _uid, _umask, start_new_session, _process_group,
        ) = more  # fmt: skip
        by_exec = os.environ.get("EXEC") == "1"
        if shell or isinstance(args, str) or by_exec or not is_python(args):
            return super()._execute_child(args, executable, *more)
        request = {
            "command": [str(word) for word in args],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
            "new_session": start_new_session,
        }
        streams = [
            stream if fd == -1 else fd for stream, fd in enumerate((p2cread, c2pwrite, errwrite))
        ]
        self._fork(request, streams, preexec_fn, pass_fds)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        return None

    def _fork(self, request, streams, preexec_fn, pass_fds) -> None:
        assert preexec_fn is None and not pass_fds, "such a process is to be started by exec"
        sys.audit("subprocess.Popen", request["command"][0], request["command"], None, None)
        body = json.dumps(request).encode()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server_path())
        socket.send_fds(self._connection, [_LENGTH.pack(len(body))], streams)
        self._connection.sendall(body)
        (self.pid,) = _LENGTH.unpack(self._connection.recv(_LENGTH.size, socket.MSG_WAITALL))

    def _internal_poll(self, *arguments, **named):
        if self._connection is None:
            return super()._internal_poll(*arguments, **named)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0.0)
        return self.returncode

    def _wait(self, timeout):
        if self._connection is None:
            return super()._wait(timeout)
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            status, cpu_seconds = json.loads(self._connection.recv(_CHUNK))
            self._connection.close()
            Popen.cpu_seconds += cpu_seconds
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _can_fork() -> bool:
    """Returns whether this process has no threads, neither Python's nor TensorFlow's."""
    context = sys.modules.get("tensorflow.python.eager.context")
    tensorflow_runs = context is not None and context.context()._initialized
    return threading.active_count() == 1 and not tensorflow_runs


def _fork_a_server(path: bytes, arguments: Sequence[Any], pass_fds: Sequence[int]) -> int:
    """Does what multiprocessing's `spawnv_passfds` does, by which it starts its servers."""
    if not _can_fork():
        return _SPAWN(path, arguments, pass_fds)
    # Before "-c" are the interpreter's own options, which this process has.
    command = [sys.executable, *map(os.fsdecode, arguments[arguments.index("-c") :])]
    pid = os.fork()
    if not pid:
        _close_all_but([0, 1, 2, *pass_fds])
        become({"command": command, "environment": dict(os.environ), "folder": os.getcwd()})
    return pid


class _ForkingPopen(Popen):
    """The `Popen` of a forked program: that forks itself, unless it has threads."""

    def _execute_child(self, args, executable, *more):
        if not _can_fork():
            return super(Popen, self)._execute_child(args, executable, *more)  # by exec
        return super()._execute_child(args, executable, *more)

    def _fork(self, request, streams, preexec_fn, pass_fds) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        try:
            _take(streams)
            if request["new_session"]:
                os.setsid()
            if preexec_fn:
                preexec_fn()
            _close_all_but([0, 1, 2, *pass_fds])
        except BaseException as error:
            os.write(2, f"cannot start {request['command']}: {error}\n".encode())
            os._exit(255)
        become(request)


def _take(streams: Sequence[int]) -> None:
    """Makes these file descriptors the standard streams."""
    copies = [os.dup(fd) for fd in streams]
    for stream, copy in enumerate(copies):
        os.dup2(copy, stream)


def run(
    command: Sequence[str], timeout: float | None = None, check: bool = False, **named: Any
) -> subprocess.CompletedProcess:
    """Does what `subprocess.run` does, with a forked process."""
    if named.pop("capture_output", False):
        named |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **named) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


# --- The server -----------------------------------------------------------------------------------


class _Server:
    """Forks what is asked for at its socket, and tells how it ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, socket.socket] = {}  # by process id

    def serve(self) -> None:
        """Serves until standard input ends: whoever started the server is gone."""
        wake, signalled = socket.socketpair()
        signalled.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        for source in (0, wake, self._listener):
            self._selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == 0:
                    return self._end()
                if key.fileobj == self._listener:
                    self._start(self._listener.accept()[0])
                elif key.fileobj == wake:
                    wake.recv(4096)
                    self._note_ended()
                elif key.data in self._running:  # who asked for it is gone
                    os.kill(key.data, signal.SIGKILL)
                    self._selector.unregister(key.fileobj)

    def _start(self, connection: socket.socket) -> None:
        request, fds = _receive(connection)
        pid = os.fork()
        if not pid:
            _take(fds)
            if request["new_session"]:
                os.setsid()
            _close_all_but([0, 1, 2])
            become(request)
        for fd in fds:
            os.close(fd)
        self._running[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        connection.sendall(_LENGTH.pack(pid))

    def _note_ended(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    return
                connection = self._running.pop(pid)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(connection)
                with contextlib.suppress(OSError):
                    cpu = usage.ru_utime + usage.ru_stime
                    connection.sendall(json.dumps([status, cpu]).encode())
                connection.close()

    def _end(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    start, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    (length,) = _LENGTH.unpack(start)
    text = b""
    while len(text) < length:
        text += connection.recv(min(_CHUNK, length - len(text)))
    return json.loads(text), list(fds)


def main() -> None:
    """Is the server; its socket, which listens, is the file descriptor that is named."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    from data_pipelines.quiet_tensorflow import import_quietly

    import_quietly()
    for name in PRELOADED:
        __import__(name)
    for name in [name for name in sys.modules if name.split(".")[0] in PRODUCT]:
        del sys.modules[name]
    _Pristine.note()
    _Server(listener).serve()


@functools.cache
def _server() -> tuple[subprocess.Popen, str]:
    """Starts a server that lives as long as this process; returns it and its socket's path."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fork-server."))
    # What the launcher preloads into workers must be there before: it does nothing for others.
    library, _ = stack.enter_context(loopback.library())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(listener.fileno())],
            stdin=subprocess.PIPE,  # which ends when this process does
            pass_fds=[listener.fileno()],
            cwd=REPOSITORY,
            env=os.environ | ({"LD_PRELOAD": str(library)} if library else {}),
            start_new_session=True,
        )
    return process, f"{folder}/socket"


def server_path() -> str:
    """Returns the path of the server's socket; starts one, if there is none yet.

    What this process starts later, such as the workers of xdist, shares it.
    """
    if PATH_VARIABLE not in os.environ:
        os.environ[PATH_VARIABLE] = _server()[1]
    return os.environ[PATH_VARIABLE]


if __name__ == "__main__":
    main()
