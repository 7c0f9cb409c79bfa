"""Runs real Spark applications where PySpark and Java are installed: make test-spark."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import InputError
from data_pipelines.prepare import PrepareConfig, ensure_store
from data_pipelines.prepare.spark import spark_faults
from tests.processes import children_of

REPOSITORY = Path(__file__).resolve().parents[3]
SPARK = importlib.util.find_spec("pyspark")
needs_spark = pytest.mark.skipif(
    SPARK is None or bool(spark_faults("")), reason="no PySpark or no Java: make test-spark"
)
# All listen on loopback alone, and a host's own settings do not count.
ENVIRONMENT = {name: value for name, value in os.environ.items() if "SPARK" not in name} | {
    "SPARK_LOCAL_IP": "127.0.0.1",
    "SPARK_LOCAL_HOSTNAME": "127.0.0.1",
    "PYSPARK_PYTHON": sys.executable,
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
    "CUDA_VISIBLE_DEVICES": "-1",
}
PROPERTIES = "spark.ui.enabled=false spark.driver.host=127.0.0.1"


def parquet(folder: Path, parts: int, documents: int) -> str:
    """Returns the spec of a Parquet file; each of its row groups is a part."""
    rng = np.random.default_rng(3)
    words = np.array([f"word{number}" for number in range(3_000)])
    texts = [" ".join(words[rng.zipf(1.3, 40) % 3_000]) for _ in range(parts * documents)]
    labels = rng.integers(0, 2, len(texts))
    path = folder / "texts.parquet"
    pq.write_table(pa.table({"text": texts, "label": labels}), path, row_group_size=documents)
    return f"parquet:{path}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_as_here(spec: str, store: Path) -> None:
    config = PrepareConfig(spec)
    here = ensure_store(config, store.with_name("here"), lambda line: None)
    assert contents(store) == contents(here.folder)
    assert not store.with_name(store.name + ".building").exists()


def prepare(spec: str, store: Path, properties: str) -> subprocess.Popen[str]:
    """Starts `prepare` on Spark, with its errors in its output."""
    flags = (f"--source={spec}", f"--out={store}", "--runner=spark")
    command = [sys.executable, "-m", "data_pipelines.prepare", *flags]
    command.append(f"--runner_options={PROPERTIES} {properties}")
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, **out)


@needs_spark
def test_spark_makes_the_same_bytes(tmp_path: Path) -> None:
    spec = parquet(tmp_path, parts=3, documents=50)
    process = prepare(spec, tmp_path / "store", "spark.master=local[2]")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert_same_as_here(spec, tmp_path / "store")


@needs_spark
def test_an_input_error_in_a_task_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "label": 1}\n{"text": "fine", "label": 0}')
    program = (
        "from pathlib import Path; from data_pipelines.prepare import PrepareConfig, build_store\n"
        "from data_pipelines.errors import InputError\n"
        f"config = PrepareConfig('jsonl:{tmp_path}/*.jsonl', runner='spark',\n"
        f"    runner_options='{PROPERTIES} spark.master=local[1]')\n"
        f"source = config.open_source(); Path('{tmp_path}/a.jsonl').unlink()\n"
        f"try: build_store(config, source, Path('{tmp_path}/store'), print)\n"
        "except InputError as error: print('refused:', error)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ENVIRONMENT, text=True, capture_output=True, timeout=300
    )
    assert re.search("refused: .*a.jsonl cannot be opened", done.stdout), done.stderr


class Daemon:
    """A process of Spark's standalone cluster, whose output is a file."""

    def __init__(self, folder: Path, name: str, *arguments: str):
        self._log = folder / f"{name}.log"
        spark_class = Path(str(SPARK.origin)).parent / "bin" / "spark-class"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [spark_class, *arguments, "--host", "127.0.0.1", "--webui-port", "0"],
                env=ENVIRONMENT,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def printed(self, pattern: str) -> list[str]:
        return re.findall(pattern, self._log.read_text())

    def wait_for(self, pattern: str) -> str:
        """Returns what the pattern's group matches in the log, once it does."""
        wait_until(lambda: self.printed(pattern) or self.process.poll() is not None)
        assert self.printed(pattern), self._log.read_text()
        return self.printed(pattern)[0]

    def executor(self) -> int:
        """Returns the process of the worker's executor."""
        (executor,) = children_of(self.process.pid)
        return executor


def wait_until(is_so: Callable[[], object], seconds: float = 400.0) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit, f"not so after {seconds:g} s"
        time.sleep(0.02)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, list[Daemon]]]:
    """Yields the address of a standalone cluster and its two workers, of a core each."""
    deploy = "org.apache.spark.deploy"
    daemons = [Daemon(folder, "master", f"{deploy}.master.Master", "--port", "0")]
    try:
        address = daemons[0].wait_for("Starting Spark master at (spark://[\\d.:]+)")
        for name in ("worker0", "worker1"):
            size = ("--cores", "1", "--memory", "2g", "--work-dir", str(folder / name))
            daemons.append(Daemon(folder, name, f"{deploy}.worker.Worker", *size, address))
        for worker in daemons[1:]:
            worker.wait_for("(Successfully registered) with master")
        yield address, daemons[1:]
    finally:
        executors = [pid for daemon in daemons for pid in children_of(daemon.process.pid)]
        for daemon in reversed(daemons):
            daemon.process.kill()
            daemon.process.wait()
        for executor in executors:  # their Python workers end with them
            with contextlib.suppress(ProcessLookupError):
                os.kill(executor, signal.SIGKILL)


@needs_spark
@pytest.mark.timeout(1800)
@pytest.mark.slow("a cluster of Java processes, minutes; quick: Spark in one process")
def test_an_executor_that_is_killed_is_replaced(tmp_path: Path) -> None:
    spec = parquet(tmp_path, parts=20, documents=300)
    store = tmp_path / "store"
    with cluster(tmp_path) as (address, workers):
        process = prepare(spec, store, f"spark.master={address} spark.executor.memory=512m")
        try:
            drafts = tmp_path / "store.building"
            wait_until(lambda: list(drafts.glob("drafts-*/*.npz")) or process.poll() is not None)
            executors = [worker.executor() for worker in workers]
            os.kill(executors[0], signal.SIGKILL)
            printed, _ = process.communicate(timeout=1000)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        assert process.returncode == 0, printed
        # The application of the drafts had a third executor; that of the shards had two.
        assert workers[0].printed(r"Executor app-\S+/\d+ finished .*exitStatus 137"), printed
        asked = [a for w in workers for a in w.printed(r"Asked to launch executor (app-\S+)/\d+")]
        assert sorted(map(asked.count, set(asked))) == [2, 3]
    assert_same_as_here(spec, store)


def test_without_spark_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--runner=spark needs PySpark: pip install"):
        PrepareConfig("movie_reviews", runner="spark")


def test_faults_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("JAVA_HOME", "/java")
    assert spark_faults("spark.master=local[2] spark.executor.memory=4g") == []
    assert "--runner_options: master=x is not" in spark_faults("master=x")[0]
    assert "No closing quotation" in spark_faults("spark.a='b")[0]
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", "")
    assert "needs Java 17" in spark_faults("")[0]
