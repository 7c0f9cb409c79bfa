"""Real workers under a real launcher: their lines, their failures, and that none is left behind."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 60.0  # of what takes one, on a machine that does much else
LAUNCHER = """
import sys
from launch.local.workers import run_local
workers, grace, restarts = sys.argv[1:4]
sys.exit(run_local(sys.argv[4:], int(workers), float(grace), int(restarts)))
"""
# A worker and its children hold the FIFO open as long as they live.
WORKER = """
import json, os, signal, subprocess, sys
alive = os.open("alive", os.O_WRONLY)
os.set_inheritable(alive, True)
index = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]
"""
READY_THEN_WAIT = "print('ready', os.getpid())\nsignal.pause()\n"


class Launcher:
    """A launcher process whose output is read line by line."""

    def __init__(self, process: subprocess.Popen[str], alive: int) -> None:
        self.process = process
        self.alive = alive

    def lines_until(self, ending: str) -> list[str]:
        """Returns the lines up to the first that ends so."""
        lines = []
        for line in self.process.stdout:
            lines.append(line.removesuffix("\n"))
            if lines[-1].endswith(ending):
                return lines
        raise AssertionError(f"no line ends with {ending!r}: {lines}")

    def ready_pids(self, workers: int) -> list[int]:
        """Returns the workers' process ids, by worker, when all have said that they are ready."""
        pids = {}
        while len(pids) < workers:
            prefix, _, pid = self.process.stdout.readline().rpartition(" ready ")
            pids[prefix] = int(pid)
        return [pids[f"[worker {index}]"] for index in range(workers)]

    def finish(self) -> tuple[int, list[str]]:
        """Returns the exit code and the rest of the lines; no worker may be left."""
        lines = self.process.stdout.read().splitlines()
        code = self.process.wait()
        self.wait_until_no_worker_lives()
        return code, lines

    def wait_until_no_worker_lives(self) -> None:
        readable, _, _ = select.select([self.alive], [], [], LIMIT_SECONDS)
        assert readable and os.read(self.alive, 1) == b""


@pytest.fixture
def launch(tmp_path):
    """Starts a launcher of workers that run the given code; kills it if the test hangs."""
    with contextlib.ExitStack() as stack:

        def start(
            code: str, workers: int = 2, grace: float = 5.0, restarts: int = 0, **environment: str
        ) -> Launcher:
            (tmp_path / "worker.py").write_text(WORKER + code)
            os.mkfifo(tmp_path / "alive")
            alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, alive)
            worker = [sys.executable, "-u", "worker.py"]
            process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, str(workers), str(grace), str(restarts), *worker],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.enter_context(killed_after(process, 3 * LIMIT_SECONDS))
            return Launcher(process, alive)

        yield start


@contextlib.contextmanager
def killed_after(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        process.kill()


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_until_gone(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        ended, _, _ = select.select([pidfd], [], [], LIMIT_SECONDS)
        os.close(pidfd)
        assert ended


MIXED_OUTPUT = r"""
os.write(1, b"out\n")
os.write(2, b"err\n")
os.write(1, b"\r10%\r20%\r\n\n")
os.write(1, "caf\u00e9 ".encode() + b"\xff\n")
os.write(1, b"no newline")
"""
MIXED_LINES = ["out", "err", "10%", "20%", "", "café \ufffd", "no newline"]


def test_lines_of_each_worker_have_its_prefix(launch):
    code, lines = launch(MIXED_OUTPUT).finish()
    assert code == 0
    for index in range(2):
        prefix = f"[worker {index}] "
        own = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
        assert own == MIXED_LINES
    assert len(lines) == 2 * len(MIXED_LINES)


def test_one_worker_has_no_prefix(launch):
    assert launch(MIXED_OUTPUT, workers=1).finish() == (0, MIXED_LINES)


def test_heavy_output_never_mixes_within_a_line(launch):
    writes_in_odd_pieces = """
text = "".join(f"{index}:{n}:" + "ab"[index] * (n % 500) + "\\n" for n in range(10000)).encode()
for start in range(0, len(text), 4093):
    os.write(1 + start % 2, text[start : start + 4093])
"""
    code, lines = launch(writes_in_odd_pieces).finish()
    assert code == 0
    for index in range(2):
        prefix = f"[worker {index}] "
        expected = [f"{prefix}{index}:{n}:" + "ab"[index] * (n % 500) for n in range(10000)]
        assert [line for line in lines if line.startswith(prefix)] == expected
    assert len(lines) == 20000


def test_workers_find_each_other_and_share_the_cores(launch):
    code, lines = launch("print(json.dumps(dict(os.environ)))", workers=3).finish()
    assert code == 0
    environments = [json.loads(line.partition("] ")[2]) for line in sorted(lines)]
    configs = [json.loads(environment["TF_CONFIG"]) for environment in environments]
    assert [config["task"]["index"] for config in configs] == [0, 1, 2]
    assert len(set(configs[0]["cluster"]["worker"])) == 3
    assert configs[0]["cluster"] == configs[1]["cluster"] == configs[2]["cluster"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert {environment["TF_NUM_INTEROP_THREADS"] for environment in environments} == {threads}


def test_one_worker_loses_an_inherited_cluster_and_keeps_set_threads(launch):
    show = "print(os.environ.get('TF_CONFIG'), os.environ['OMP_NUM_THREADS'])"
    launcher = launch(show, workers=1, TF_CONFIG="of another job", OMP_NUM_THREADS="7")
    assert launcher.finish() == (0, ["None 7"])


@pytest.mark.parametrize("failure", [2, 3])
def test_the_first_failure_stops_the_others_and_its_code_is_kept(launch, failure):
    start = time.monotonic()
    code, lines = launch(f"if index == 1: sys.exit({failure})\nsignal.pause()", workers=3).finish()
    assert time.monotonic() - start < LIMIT_SECONDS
    assert (code, lines[-1]) == (failure, f"launch: worker 1 exited with code {failure}")


def test_the_root_cause_is_named_not_those_that_fail_by_it(launch):
    others_fail_with_1 = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
    launcher = launch(others_fail_with_1 + READY_THEN_WAIT, workers=3)
    os.kill(launcher.ready_pids(3)[2], signal.SIGKILL)
    assert launcher.finish() == (137, ["launch: worker 2 was killed by signal 9 (SIGKILL)"])


def test_who_ignores_term_is_killed_after_the_grace(launch):
    ignore = "if index == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    launcher = launch(ignore + READY_THEN_WAIT, grace=0.5)
    pids = launcher.ready_pids(2)
    start = time.monotonic()
    os.kill(pids[1], signal.SIGABRT)
    assert launcher.finish() == (
        134,
        [
            "launch: worker 0 did not stop on TERM and was killed",
            "launch: worker 1 was killed by signal 6 (SIGABRT)",
        ],
    )
    assert 0.5 <= time.monotonic() - start < LIMIT_SECONDS


def test_a_worker_may_end_before_the_others(launch):
    last_one = "if index == 0: signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))\n"
    launcher = launch(last_one + "print('ready', os.getpid())\nif index == 0: signal.pause()")
    pids = launcher.ready_pids(2)
    wait_until_gone(pids[1])
    os.kill(pids[0], signal.SIGUSR1)
    assert launcher.finish() == (0, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_all(launch, number):
    save = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
    launcher = launch(save + READY_THEN_WAIT)
    pids = launcher.ready_pids(2)
    launcher.process.send_signal(number)
    code, lines = launcher.finish()
    assert code == 128 + number
    assert sorted(lines[:2]) == ["[worker 0] saved", "[worker 1] saved"]
    assert lines[2:] == [f"launch: stopped by {number.name}"]
    assert not any(exists(pid) for pid in pids)


def test_a_second_signal_kills_at_once(launch):
    refuse = "signal.signal(signal.SIGTERM, lambda *_: print('refused'))\n"
    launcher = launch(refuse + READY_THEN_WAIT + "signal.pause()", grace=1000)
    pids = launcher.ready_pids(2)
    launcher.process.send_signal(signal.SIGINT)
    for _ in pids:
        launcher.lines_until("refused")
    launcher.process.send_signal(signal.SIGTERM)
    code, lines = launcher.finish()
    assert (code, lines[-1]) == (130, "launch: stopped by SIGINT")
    assert not any(exists(pid) for pid in pids)


def test_no_worker_outlives_a_killed_launcher(launch):
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    launcher = launch(ignore + READY_THEN_WAIT)
    launcher.ready_pids(2)
    launcher.process.kill()
    assert launcher.finish() == (-signal.SIGKILL, [])


def test_what_a_worker_leaves_behind_is_killed(launch):
    child = "[sys.executable, '-c', 'import signal; signal.pause()']"
    leave = f"subprocess.Popen({child}, pass_fds=[alive])"
    assert launch(leave).finish() == (0, [])


FLOOD = "while True: print('x' * 1000)"


def test_a_blocked_terminal_does_not_block_signals(launch):
    launcher = launch(f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{FLOOD}", grace=0.2)
    launcher.lines_until("x")
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait_until_no_worker_lives()  # and nobody reads the launcher's lines
    code, lines = launcher.finish()
    assert (code, lines[-1]) == (130, "launch: stopped by SIGINT")


def test_when_nobody_reads_the_lines_any_more_all_ends(launch):
    launcher = launch(FLOOD)
    launcher.lines_until("x")
    launcher.process.stdout.close()
    assert launcher.process.wait() == 128 + signal.SIGPIPE
    launcher.wait_until_no_worker_lives()


def test_who_lost_a_peer_is_not_at_fault_though_it_ends_first(launch):
    code = """
if index == 1:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
    print("ready", os.getpid())
    signal.pause()
print("ready", os.getpid())
sys.exit(75)
"""
    launcher = launch(code)
    pids = launcher.ready_pids(2)
    wait_until_gone(pids[0])
    os.kill(pids[1], signal.SIGUSR1)
    assert launcher.finish() == (7, ["launch: worker 1 exited with code 7"])


def test_who_still_runs_when_all_others_lost_a_peer_hangs(launch):
    code = "print('ready', os.getpid())\nif index != 1: sys.exit(75)\nsignal.pause()\n"
    launcher = launch(code, workers=3)
    os.kill(launcher.ready_pids(3)[1], signal.SIGSTOP)
    start = time.monotonic()
    code, lines = launcher.finish()
    assert code == 75
    assert re.fullmatch(
        "launch: worker 1 hung: worker [02] waited for it until the timeout; it was killed",
        lines[-1],
    )
    assert len(lines) == 1 and time.monotonic() - start < LIMIT_SECONDS


def test_when_all_lost_a_peer_nobody_is_blamed(launch):
    code, lines = launch("sys.exit(75)").finish()
    assert code == 75
    assert re.fullmatch("launch: worker [01] lost a peer, and so did all that failed", lines[-1])


# Each start of a worker writes one line.
COUNT_STARTS = """
with open("starts", "a") as file:
    file.write(f"{index}\\n")
starts = len(open("starts").readlines())
"""


def starts(folder: Path) -> list[str]:
    return sorted((folder / "starts").read_text().split())


def test_all_are_started_again_until_it_works(launch, tmp_path):
    fail_twice = "if index == 0: sys.exit()\n" + COUNT_STARTS + "sys.exit(3 if starts < 3 else 0)"
    launcher = launch(fail_twice, restarts=5)
    code, lines = launcher.finish()
    assert (code, lines) == (
        0,
        [
            "launch: worker 1 exited with code 3",
            "launch: restart 1 of 5",
            "launch: worker 1 exited with code 3",
            "launch: restart 2 of 5",
        ],
    )
    assert starts(tmp_path) == ["1"] * 3


def test_each_start_has_other_ports(launch):
    show = "print(json.loads(os.environ['TF_CONFIG'])['cluster'])\nsys.exit(1)"
    code, lines = launch(show, restarts=1).finish()
    assert code == 1
    clusters = [line.partition("] ")[2] for line in lines if line.startswith("[worker")]
    assert len(set(clusters)) == 2


def test_it_gives_up_after_the_last_restart(launch, tmp_path):
    code, lines = launch(COUNT_STARTS + "sys.exit(4)", workers=1, restarts=2).finish()
    assert (code, lines[-2:]) == (
        4,
        ["launch: worker 0 exited with code 4", "launch: gave up after 2 restarts"],
    )
    assert starts(tmp_path) == ["0"] * 3


def test_a_configuration_error_is_not_tried_again(launch, tmp_path):
    code, lines = launch(COUNT_STARTS + "sys.exit(2)", workers=1, restarts=3).finish()
    assert (code, lines) == (2, ["launch: worker 0 exited with code 2"])
    assert starts(tmp_path) == ["0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launcher_starts_nothing_again(launch, tmp_path, number):
    launcher = launch(COUNT_STARTS + READY_THEN_WAIT, restarts=3)
    launcher.ready_pids(2)
    launcher.process.send_signal(number)
    assert launcher.finish() == (128 + number, [f"launch: stopped by {number.name}"])
    assert starts(tmp_path) == ["0", "1"]
