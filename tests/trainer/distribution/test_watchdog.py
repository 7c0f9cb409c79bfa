import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import tensorflow as tf

from tests import forked
from tests.integration.equivalence import run_workers
from trainer.distribution.tf_distribute import TfDistributor
from trainer.distribution.watchdog import LOCAL_WORK_SECONDS, Judge, Record, Watchdog

REPOSITORY = Path(__file__).resolve().parents[3]
TIMEOUT = 10.0


class Job:
    """Records of workers that beat once a second, and a judge that looks at them."""

    def __init__(self, size: int = 3):
        self.judge = Judge(size, TIMEOUT)
        self.seconds = 0.0
        self.table = [Record()] * size

    def one_second(self, *joined: int, finished: int | None = None, stopped=(), working=()) -> None:
        """Lets a second pass, after which worker i has joined `joined[i]` collectives."""
        self.seconds += 1
        for rank, count in enumerate(joined):
            if rank not in stopped:
                done = min(joined) if finished is None else finished
                beat = self.table[rank].beat + 1
                self.table[rank] = Record(beat, count, min(done, count), rank in working)
        self.judge.look(self.table, self.seconds)

    @property
    def verdict(self) -> tuple[tuple[int, ...], str] | None:
        return self.judge.verdict(self.seconds)


class Memory(dict):
    """A store in this process, which can be lost."""

    on_worker_0 = True
    is_lost = False

    def put(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> str | None:
        if self.is_lost:
            raise OSError("no answer")
        return super().get(key)


def leaving(store: Memory, size: int) -> list[threading.Thread]:
    """Returns threads in which the workers leave."""
    watchdogs = [Watchdog(rank, size, TIMEOUT, store) for rank in range(size)]
    for watchdog in watchdogs:
        watchdog.close()
    return [threading.Thread(target=watchdog.leave) for watchdog in watchdogs]


def test_nobody_leaves_before_all_have_come() -> None:
    threads = leaving(Memory(), 3)
    for thread in threads[:2]:
        thread.start()
    threads[0].join(0.3)
    assert [thread.is_alive() for thread in threads[:2]] == [True, True]
    threads[2].start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_worker_leaves_if_worker_0_which_spoke_for_all_has_ended() -> None:
    store = Memory()
    _, second = leaving(store, 2)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    store.is_lost = True
    second.join(10)
    assert not second.is_alive()


def test_a_worker_that_does_not_come_is_not_waited_for_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.distribution.watchdog._LEAVE_SECONDS", 0.3)
    first, _ = leaving(Memory(), 2)
    first.start()
    first.join(10)
    assert not first.is_alive()


def test_a_worker_that_does_not_join_is_found_after_the_timeout() -> None:
    job = Job()
    job.one_second(7, 7, 7)
    for _ in range(11):
        job.one_second(8, 7, 8)
        assert job.verdict is None
    job.one_second(8, 7, 8)
    assert job.verdict == (
        (1,),
        "worker 1 has not joined a collective in which others have waited for 11 seconds",
    )


def test_all_that_do_not_join_are_named() -> None:
    job = Job()
    for _ in range(13):
        job.one_second(7, 8, 7)
    assert job.verdict[0] == (0, 2)
    assert job.verdict[1].startswith("workers 0, 2 have not joined")


def test_a_slow_worker_is_waited_for_as_long_as_it_comes() -> None:
    job = Job()
    for step in range(10):
        for _ in range(8):
            job.one_second(step + 1, step, step + 1)
            assert job.verdict is None


def test_nobody_is_missed_where_nobody_waits() -> None:
    job = Job()
    for _ in range(100):
        job.one_second(7, 7, 7)  # all compute, or read, or write
        assert job.verdict is None
    for _ in range(100):
        job.one_second(7, 7, 7, stopped=(1, 2))  # they have ended
        assert job.verdict is None


@pytest.mark.parametrize("guilty", [(0,), (1,), (1, 2)])
@pytest.mark.parametrize("behind", [0, 1])
def test_a_process_that_is_silent_is_found_also_in_the_middle_of_a_collective(
    guilty: tuple[int, ...], behind: int
) -> None:
    job = Job()
    job.one_second(7, 7, 7)
    counts = [8 - behind * (rank in guilty) for rank in range(3)]
    # Worker 0 passes on what the others say; the judge is worker 2.
    stopped = (0, 1) if guilty == (0,) else guilty
    for _ in range(11):
        job.one_second(*counts, finished=7, stopped=stopped)
        assert job.verdict is None
    job.one_second(*counts, finished=7, stopped=stopped)
    ranks, reason = job.verdict
    assert ranks == guilty
    assert reason.endswith("not answered for 12 seconds")


def test_without_worker_0_nobody_else_is_blamed() -> None:
    job = Job()
    job.one_second(7, 7, 7)
    for _ in range(11):
        job.one_second(7, 8, 8, finished=7, stopped=(0, 1))  # what worker 2 sees
        assert job.verdict is None
    job.one_second(7, 8, 8, finished=7, stopped=(0, 1))
    assert job.verdict[0] == (0,)


def test_a_worker_that_traces_or_writes_has_longer() -> None:
    job = Job(2)
    job.one_second(7, 7)
    for _ in range(int(LOCAL_WORK_SECONDS) + 1):
        job.one_second(8, 7, working=(1,))
        assert job.verdict is None
    job.one_second(8, 7, working=(1,))
    assert job.verdict[0] == (1,)


def test_a_worker_that_is_done_with_its_own_work_has_the_timeout_again() -> None:
    job = Job(2)
    for _ in range(300):
        job.one_second(8, 7, working=(1,))
    assert job.verdict is None
    job.one_second(8, 8)
    for _ in range(12):
        job.one_second(9, 8)
    assert job.verdict[0] == (1,)


def test_a_collective_that_all_have_joined_must_end() -> None:
    job = Job(2)
    for _ in range(11):
        job.one_second(8, 8, finished=7)
        assert job.verdict is None
    job.one_second(8, 8, finished=7)
    assert job.verdict == ((), "a collective that all workers joined has not ended for 11 seconds")


def test_slack_tells_before_the_timeout() -> None:
    job = Job(2)
    for _ in range(9):
        job.one_second(8, 7)
    assert job.judge.verdict(job.seconds, slack_seconds=3.0).workers == (1,)
    assert job.verdict is None


class Dictionary:
    """A store for workers that are threads of one process."""

    on_worker_0 = False

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def put(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> str | None:
        return self.values.get(key)


def test_collectives_are_counted_once_a_process_whatever_the_number_of_its_shards(
    two_shards: TfDistributor,
) -> None:
    watchdog = Watchdog(0, 2, 60.0, Dictionary())
    distributor = TfDistributor(two_shards._strategy, 0, 1, watchdog)

    @tf.function
    def step(value: tf.Tensor) -> tf.Tensor:
        def shard(value: tf.Tensor) -> tf.Tensor:
            rows = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([1, 2], tf.int64))
            early, counts = distributor.all_reduce_sum(
                [value, distributor.row_counts([rows], tf.float32)]
            )
            (gathered,) = distributor.all_gather_rows([rows], counts)
            return tf.reduce_sum(gathered.values * early)

        return distributor.run(shard, value)

    for count in (2, 4):
        assert step(tf.constant(1.0)).numpy() == 24.0
        assert (watchdog._joined.numpy(), watchdog._finished.numpy()) == (count, count)
    watchdog.close()


def test_a_job_of_one_worker_has_no_watchdog() -> None:
    before = set(threading.enumerate())
    watchdog = Watchdog(0, 1)
    assert set(threading.enumerate()) <= before
    with watchdog.local_work():
        watchdog.tracing()
    assert watchdog.suspicion() == ""


# Two workers as threads: worker 1 never joins. What worker 0's `abort` does is up to the test.
PROGRAM = """
import sys, threading
from tests.trainer.distribution.test_watchdog import Dictionary
from trainer.distribution.watchdog import Watchdog, suspicion

store, aborted = Dictionary(), threading.Event()
innocent = Watchdog(0, 2, 4.0, store, lambda reason: (print(reason), aborted.set()))
guilty = Watchdog(1, 2, 4.0, store, lambda reason: print("not to be called"))
innocent._joined.assign_add(1)
aborted.wait(60)
print("suspects:", suspicion(), flush=True)
if sys.argv[1] == "ends":
    sys.exit(3)
threading.Event().wait(60)
"""


@pytest.mark.parametrize(("does", "code"), [("ends", 3), ("hangs", 75)])
def test_a_main_thread_that_does_not_end_is_ended(does: str, code: int) -> None:
    began = time.monotonic()
    done = forked.run(
        [sys.executable, "-c", PROGRAM, does],
        cwd=REPOSITORY,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert time.monotonic() - began < 60
    lines = done.stdout.splitlines()
    reason = "worker 1 has not joined a collective in which others have waited for "
    assert lines[0].startswith(reason)
    assert lines[1].startswith(f"suspects: {reason}")
    assert lines[2:] == ([f"worker 0 lost a peer: {lines[0]}"] if code == 75 else [])


# Worker 1 is slow in tracing, then in what it announces, then without a word.
SLOW = """
import os, sys, time
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
import tensorflow as tf
from trainer.distribution import cluster, watchdog
from trainer.distribution.make import make_distributor

LIMIT_SECONDS = 3.0
distributor = make_distributor("auto", cluster.resolve(os.environ), LIMIT_SECONDS)

def be_slow():
    if distributor.rank == 1:
        time.sleep(3 * LIMIT_SECONDS)

@tf.function
def step():
    def shard():
        be_slow()
        return distributor.all_reduce_sum([tf.ones([])])[0]
    return distributor.run(shard)

assert step().numpy() == 2.0
print("traced", flush=True)
with distributor.watchdog.local_work():
    be_slow()
distributor.barrier()
print("worked", flush=True)
be_slow()
try:
    distributor.barrier()
except Exception:
    print("suspects:", watchdog.suspicion(), flush=True)
    os._exit(75)
"""


@pytest.mark.parametrize(
    "distributor", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_what_a_worker_does_alone_may_take_longer_than_the_timeout(distributor: str) -> None:
    done = run_workers([sys.executable, "-c", SLOW], 2, distributor == "horovod")
    assert done.returncode == 75, done.stdout
    for rank in (0, 1):
        assert f"[worker {rank}] traced\n[worker {rank}] worked\n" in re.sub(
            rf"\[worker {1 - rank}\].*\n", "", done.stdout
        )
    said = r"worker 1 has not joined a collective in which others have waited for \d+ seconds"
    assert re.search(rf"\[worker 0\] suspects: {said}", done.stdout), done.stdout
