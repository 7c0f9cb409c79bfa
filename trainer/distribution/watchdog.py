"""Finds hung workers, with two threads in each worker however many collectives there are.

One thread publishes the worker's record through a key-value store and reads the others' records.
Worker 0 collects all of them in one table, so requests grow linearly with the number of workers.
The other thread judges the table and never waits for the network.
"""

import atexit
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from data_pipelines.errors import LOST_WORKER_EXIT_CODE

LOCAL_WORK_SECONDS = 900.0  # limit for a worker that traces, compiles, reads or writes
_TICK_SECONDS = 0.5
_WORKERS_PER_TICK = 32  # larger jobs tick more slowly: the store serves about 200 requests a second
_RAISE_SECONDS = 2.0  # for the main thread to raise
_EXIT_SECONDS = 10.0  # for the interpreter to shut down after that
_LEAVE_SECONDS = 30.0  # for all workers to end together
_GUILTY_SECONDS = 30.0  # for a launcher to see which worker still runs
_STDOUT = 1  # file descriptor
_watchdogs: "list[Watchdog]" = []  # of this process: one, if it has peers


class Store(Protocol):
    """A key-value store that all workers reach. A failed request raises an error."""

    on_worker_0: bool  # whether it is lost with worker 0

    def put(self, key: str, value: str) -> None:
        """Sets or replaces the value of a key."""

    def get(self, key: str) -> str | None:
        """Returns the value of a key, or None if it is not set."""


class Record(NamedTuple):
    """State of a worker, as published by itself."""

    beat: int = 0  # grows as long as the process runs
    joined: int = 0  # number of collectives that it has started
    finished: int = 0  # number of collectives that it has completed
    works_alone: bool = False  # whether it does something long that needs no other worker


class Verdict(NamedTuple):
    """The hung workers (none, if the network is at fault), and a sentence that names them."""

    workers: tuple[int, ...]
    reason: str


class Judge:
    """Finds hung workers by their records. Times are seconds on any clock that starts at 0."""

    def __init__(self, size: int, timeout_seconds: float):
        self._timeout_seconds = timeout_seconds
        self._delay_seconds = 2 * tick_seconds(size)  # of a record on its way
        self._table = [Record()] * size
        self._heard = [0.0] * size  # when each beat last changed
        self._progress: tuple[Any, ...] = ()
        self._progressed = 0.0  # when the progress last changed

    def look(self, table: Sequence[Record], now: float) -> None:
        """Takes the newest records."""
        for rank, record in enumerate(table):
            if record.beat != self._table[rank].beat:
                self._heard[rank] = now
        self._table = list(table)
        joined = [record.joined for record in table]
        waits = max(joined) > min(joined)
        # While a worker is behind, only its own progress ends the wait.
        finished = 0 if waits else sum(record.finished for record in table)
        progress = (min(joined), waits, finished)
        if progress != self._progress:
            self._progress, self._progressed = progress, now

    def verdict(self, now: float, slack_seconds: float = 0.0) -> Verdict | None:
        """Returns the hung workers; None if there are none, or if no worker waits.

        Args:
            slack_seconds: How long before the timeout a worker already counts as hung.
        """
        limit = self._timeout_seconds - slack_seconds
        if all(record.joined == record.finished for record in self._table):
            return None
        ages = [now - heard for heard in self._heard]
        if silent := [rank for rank, age in enumerate(ages) if age > limit + self._delay_seconds]:
            silent = [0] if 0 in silent else silent  # the others' records come through worker 0
            seconds = min(ages[rank] for rank in silent)
            return _verdict(silent, f"not answered for {seconds:.0f} seconds")
        if max(ages) > 2 * self._delay_seconds:
            return None  # counts are unknown
        seconds = now - self._progressed
        lowest, waits, _ = self._progress
        if not waits:
            said = f"a collective that all workers joined has not ended for {seconds:.0f} seconds"
            return Verdict((), said) if seconds > limit else None
        local_limit = max(LOCAL_WORK_SECONDS, limit)
        behind = [
            rank
            for rank, record in enumerate(self._table)
            if record.joined == lowest and seconds > (local_limit if record.works_alone else limit)
        ]
        said = f"not joined a collective in which others have waited for {seconds:.0f} seconds"
        return _verdict(behind, said) if behind else None


def tick_seconds(size: int) -> float:
    """Returns how often a job of `size` workers publishes and judges records."""
    return _TICK_SECONDS * max(1.0, size / _WORKERS_PER_TICK)


def _verdict(workers: Sequence[int], has: str) -> Verdict:
    names = ", ".join(map(str, workers))
    who = f"worker {names} has" if len(workers) == 1 else f"workers {names} have"
    return Verdict(tuple(workers), f"{who} {has}")


def suspicion() -> str:
    """Returns a sentence that names the hung workers of this process's job, "" if there are none.

    It explains an error that came before the verdict, from a peer or from a library. So a worker
    already counts as hung shortly before the timeout.
    """
    return next(filter(None, (watchdog.suspicion() for watchdog in _watchdogs)), "")


class Watchdog:
    """Watches all workers of a job, from one of them.

    If a collective waits longer than `timeout_seconds`, the watchdog calls `abort` with a sentence
    that names the hung workers. `abort` makes waiting collectives raise. If the process still runs
    after that, the watchdog ends it.

    Args:
        store: None for a job of one worker, which needs no watch.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        timeout_seconds: float = 0.0,
        store: Store | None = None,
        abort: Callable[[str], None] = lambda reason: None,
    ):
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        self._abort = abort
        self._judge = Judge(size, timeout_seconds)
        self._seconds = 0.0  # for which this worker has watched
        self._table = [Record()] * size
        self._exchanged = time.monotonic()
        self._tick_seconds = tick_seconds(size)
        self._beats = itertools.count(1)
        self._works_alone = 0
        self._traced_at = -1
        self._stop = threading.Event()
        self._store = store
        if store is None:
            return
        _watchdogs.append(self)
        with tf.device("CPU:0"):
            self._joined, self._finished = (
                tf.Variable(0, trainable=False, dtype=tf.int64) for _ in range(2)
            )
        self._threads = [
            threading.Thread(target=work, args=[store], name=f"watchdog {name}", daemon=True)
            for name, work in (("exchange", self._exchange), ("judge", self._watch))
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # no TensorFlow call while the interpreter shuts down

    def counted(
        self,
        collective: Callable[[Sequence[tf.Tensor]], Any],
        tensors: Sequence[tf.Tensor],
        counts: tf.Tensor,
    ) -> Any:
        """Returns, inside a step, `collective(tensors)`; counts it at its start and at its end.

        Args:
            counts: Whether this shard counts: one shard of each process does.
        """
        if self._store is None:
            return collective(tensors)
        one = tf.cast(counts, tf.int64)
        with tf.control_dependencies([tf.convert_to_tensor(tensor) for tensor in tensors]):
            joined = self._joined.assign_add(one, read_value=False)
        with tf.control_dependencies([joined]):
            results = collective(tensors)
        with tf.control_dependencies(tf.nest.flatten(results)):
            self._finished.assign_add(one, read_value=False)
        return results

    def tracing(self) -> None:
        """Marks this worker as working alone until it joins the next collective."""
        if self._store is not None:
            with tf.init_scope():
                self._traced_at = int(self._joined.numpy())

    @contextlib.contextmanager
    def local_work(self) -> Iterator[None]:
        """Marks this worker as working alone during the block."""
        self._works_alone += 1
        try:
            yield
        finally:
            self._works_alone -= 1

    def suspicion(self) -> str:
        """Returns as the function of this name."""
        verdict = self._judge.verdict(self._seconds, min(3.0, self._timeout_seconds / 2))
        return verdict.reason if verdict else ""

    def leave(self) -> None:
        """Waits, for seconds at most, until all workers have come here; after the last collective.

        A worker that ends at once closes the connection on which another may still receive its
        part of that collective.
        """
        if self._store is None:
            return
        last = time.monotonic() + _LEAVE_SECONDS
        peers = range(1, len(self._table)) if self._rank == 0 else [0]  # which speaks for all
        with contextlib.suppress(OSError, tf.errors.OpError):  # it has ended: all had come
            if self._rank > 0:
                self._store.put(f"left_{self._rank}", "1")
            for peer in peers:
                while self._store.get(f"left_{peer}") is None and time.monotonic() < last:
                    time.sleep(0.01)
            if self._rank == 0:
                self._store.put("left_0", "1")

    def close(self) -> None:
        """Ends the watch."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self._tick_seconds)  # a request may hang

    def _exchange(self, store: Store) -> None:
        while not self._stop.wait(self._tick_seconds):
            # A failed request is no verdict: a lost peer is silent, and peers may end first.
            with contextlib.suppress(OSError, ValueError, TypeError, tf.errors.OpError):
                self._table = self._exchanged_table(store, self._record())
                self._exchanged = time.monotonic()

    def _record(self) -> Record:
        joined, finished = int(self._joined.numpy()), int(self._finished.numpy())
        works_alone = self._works_alone > 0 or joined == self._traced_at
        return Record(next(self._beats), joined, finished, works_alone)

    def _exchanged_table(self, store: Store, mine: Record) -> list[Record]:
        if self._rank > 0:
            store.put(f"worker_{self._rank}", json.dumps(mine))
            text = store.get("workers")
            return [Record(*fields) for fields in json.loads(text)] if text else self._table
        table = [mine]
        for rank in range(1, len(self._table)):
            text = store.get(f"worker_{rank}")
            table.append(Record(*json.loads(text)) if text else self._table[rank])
        store.put("workers", json.dumps(table))
        return table

    def _watch(self, store: Store) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._tick_seconds):
            now, longest = time.monotonic(), 4 * self._tick_seconds
            # Time in which this process itself was stopped does not count.
            passed, before = min(now - before, longest), now
            if not store.on_worker_0 and now - self._exchanged > longest:
                continue  # nor does time in which the store does not answer
            self._seconds += passed
            # Its own record must be live: worker 0, which returns it, may hang.
            table = [*self._table[: self._rank], self._record(), *self._table[self._rank + 1 :]]
            self._judge.look(table, self._seconds)
            if verdict := self._judge.verdict(self._seconds):
                self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        if self._rank in verdict.workers:
            time.sleep(_GUILTY_SECONDS)
        else:
            # In a thread, because it may wait for the hung worker.
            threading.Thread(target=self._abort, args=[verdict.reason], daemon=True).start()
            if self._stop.wait(_RAISE_SECONDS):
                time.sleep(_EXIT_SECONDS)  # it raised, and has its own exit code
        # Not through sys.stdout: the main thread may hold its lock.
        os.write(_STDOUT, f"worker {self._rank} lost a peer: {verdict.reason}\n".encode())
        os._exit(LOST_WORKER_EXIT_CODE)
