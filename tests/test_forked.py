"""A forked program does what the same program does that is started by exec."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "words": "import sys; print(sys.argv, sys.orig_argv[1:], __name__, __file__ if 0 else '')",
    "path": "import os, sys; print(os.getcwd(), sys.path, os.environ['GIVEN'])",
    "status": "raise SystemExit(7)",
    "message": "raise SystemExit('why')",
    "error": "1 / 0",
    "killed": "import os; print('before', flush=True); os.kill(os.getpid(), 9)",
    "interrupted": "import signal; signal.raise_signal(signal.SIGINT)",
    "terminated": "import signal; signal.raise_signal(signal.SIGTERM)",
    "at exit": "import atexit; atexit.register(print, 'last'); print('first')",
    "thread": "import threading, time; threading.Timer(0.2, print, ['late']).start()",
    "at once": "import os; print('not flushed'); os._exit(3)",
    "files": "import os; print(os.listdir('/proc/self/fd'))",
    "signals": (
        "import signal;"
        "print([signal.getsignal(number) for number in sorted(signal.valid_signals())])"
    ),
    "flags, again in what it starts": (
        "import subprocess, sys;"
        'program = \'from absl import flags; flags.DEFINE_integer("workers", 1, "");\';'
        "exec(program);"
        "print(subprocess.run([sys.executable, '-c', program], capture_output=True))"
    ),
    "nested": (
        "import subprocess, sys;"
        "program = 'import os, sys; print(os.getppid()); sys.exit(sys.argv[1])';"
        "done = subprocess.run([sys.executable, '-c', program, 'bye'], capture_output=True);"
        "import os; print(int(done.stdout) == os.getpid(), done.stderr, done.returncode)"
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_code_does_what_it_does_by_exec(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAMS[name], "a", "--b"]
    environment = {**os.environ, "GIVEN": "x", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # with it a new process handles SIGTERM
    by_fork, by_exec = (
        run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        for run in (forked.run, subprocess.run)
    )
    assert by_fork.returncode == by_exec.returncode
    assert by_fork.stdout == by_exec.stdout
    assert by_fork.stderr.splitlines()[-1:] == by_exec.stderr.splitlines()[-1:]


def test_a_module_does_what_it_does_by_exec() -> None:
    command = [sys.executable, "-m", "trainer.main", "--nonsense"]
    by_fork, by_exec = (
        run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        for run in (forked.run, subprocess.run)
    )
    assert (by_fork.returncode, by_fork.stderr) == (2, by_exec.stderr)
    assert "--nonsense is not a flag" in by_fork.stderr


def test_tensorflow_is_there_and_computes() -> None:
    program = (
        "import sys; there = 'tensorflow' in sys.modules; import tensorflow as tf;"
        "print(there, int(tf.reduce_sum(tf.matmul(tf.ones([300, 300]), tf.ones([300, 300])))))"
    )
    for _ in range(3):
        done = forked.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout == f"{os.environ.get('EXEC') != '1'} {300**3}\n", done.stderr


def test_the_server_of_multiprocessing_has_tensorflow_already(tmp_path: Path) -> None:
    """Where a forked program starts it; and its processes end with the program."""
    (tmp_path / "there.py").write_text(
        "import os, sys\ndef there(): return 'tensorflow' in sys.modules, os.getppid()\n"
    )
    program = (
        "import multiprocessing, os, there\n"
        "with multiprocessing.get_context('forkserver').Pool(2) as pool:\n"
        "    loaded, parent = pool.apply(there.there)\n"
        "print(loaded, parent == os.getpid())"
    )
    done = forked.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{os.environ.get('EXEC') != '1'} False\n", done.stderr


def test_a_process_can_be_hurt_and_waited_for() -> None:
    program = "import signal; print('ready', flush=True); signal.pause()"
    command = [sys.executable, "-c", program]
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert process.stdout.read() == ""


def test_a_process_ends_with_who_started_it() -> None:
    program = "import signal; print('ready', flush=True); signal.pause()"
    process = forked.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    if process._connection is None:
        process.kill()
        pytest.skip("EXEC=1")
    process._connection.close()
    assert process.stdout.read() == ""  # ended
    process.stdout.close()
    process.returncode = 0
    while Path(f"/proc/{process.pid}").exists():
        time.sleep(0.01)
