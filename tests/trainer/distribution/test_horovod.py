"""Horovod's collectives between real processes, and how their waits are bounded."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from tests import forked
from tests.trainer.distribution import horovod_program as program
from trainer.distribution import horovod
from trainer.distribution.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[3]
LAUNCHER = """
import sys
from launch.local.workers import run_local
sys.exit(run_local(sys.argv[2:], int(sys.argv[1]), with_horovod=True))
"""


@pytest.fixture(scope="module", params=[2, 3])  # two workers add by other collectives than more
def results(request, tmp_path_factory) -> list[dict]:
    """Returns what each of the workers found, by rank."""
    folder = tmp_path_factory.mktemp("results")
    worker = [sys.executable, "-m", "tests.trainer.distribution.horovod_program", str(folder)]
    done = forked.run(
        [sys.executable, "-c", LAUNCHER, str(request.param), *worker],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(request.param)]


@pytest.mark.horovod
def test_the_environment_chooses_horovod(results: list[dict]) -> None:
    for result in results:
        assert result["kind"] == "HorovodDistributor"
        assert (result["shard"], result["shards"]) == (0, len(results))


@pytest.mark.horovod
def test_sums_of_every_type_and_shape_in_one_call(results: list[dict]) -> None:
    ranks = range(len(results))
    expected = [
        np.full((2, 3), sum(rank + 1.0 for rank in ranks)).tolist(),
        sum(2.0**-40 + rank for rank in ranks),
        sum(10.0**rank for rank in ranks),
        [],
        [sum(rank + 0.5 for rank in ranks)],
        [sum(rank + 0.5 for rank in ranks)],
    ]
    for result in results:
        assert result["reduced"]["values"] == expected
        assert result["reduced"]["shapes"] == [[2, 3], [], [], [0, 4], [1], [1]]
        assert result["reduced"]["dtypes"] == [
            "float32", "float64", "float32", "float32", "bfloat16", "float16",
        ]  # fmt: skip


@pytest.mark.horovod
def test_values_outside_of_a_step(results: list[dict]) -> None:
    size = len(results)
    total = float(sum(range(size)))
    for result in results:
        found = result["outside"]
        assert found["sums"] == [[[total, total]] * 2, size * 2.0**-40 + total, [float(size)]]
        assert found["objects"] == [{"rank": r, "é": [r] * r} for r in range(size)]
        assert found["arrays"] == {
            "a": ["float32", [0.0, 1.0, 2.0, 3.0, 4.0]],
            "b": ["int64", [[2**40 + 1]]],
        }


@pytest.mark.horovod
@pytest.mark.parametrize("name", program.OPTIMIZERS)
def test_n_processes_train_as_one_does(results: list[dict], name: str) -> None:
    from trainer.distribution.tf_distribute import one_device

    alone = program.trained(one_device(), name, slice(None))
    for result in results:
        np.testing.assert_allclose(result["trained"][name], alone, rtol=2e-6)
        assert result["trained"][name] == results[0]["trained"][name]
    untrained = keras.ops.ones((4, 2)).numpy()
    assert np.abs(np.array(alone) - untrained).min() > 0.01


@pytest.mark.parametrize("timeout_seconds", [0.5, 5.0, 7.9, 60.0, 1000.0])
def test_gloo_gives_up_after_the_watchdog(timeout_seconds: float) -> None:
    environ: dict[str, str] = {}
    horovod.bound_collectives(environ, timeout_seconds, watched=True)
    assert int(environ["HOROVOD_STALL_CHECK_DISABLE"]) == 1
    limit = max(5.0, timeout_seconds)
    assert limit + 2 <= int(environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]) < limit + 3


@pytest.mark.parametrize("timeout_seconds", [0.5, 5.0, 7.9, 60.0, 1000.0])
def test_the_worst_wait_without_a_watchdog_is_within_the_timeout(timeout_seconds: float) -> None:
    environ: dict[str, str] = {}
    horovod.bound_collectives(environ, timeout_seconds, watched=False)
    limit = max(5.0, timeout_seconds)
    check = int(environ["HOROVOD_STALL_CHECK_TIME_SECONDS"])
    shutdown = int(environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
    # Two looks until it leaves the cache, and the look that comes after the shutdown time.
    assert 0 < check <= shutdown and 3 * check + shutdown <= limit
    assert shutdown > limit - 5  # and it is not given up much earlier
    assert "HOROVOD_STALL_CHECK_DISABLE" not in environ


@pytest.mark.horovod
def test_who_has_not_started_is_named() -> None:
    from launch.local.horovod import Rendezvous, worker_environments

    rendezvous = Rendezvous(3)
    first, _, third = worker_environments(3, rendezvous.port)
    with rendezvous.serving():
        cluster = Cluster(0, 3, horovod=True)
        stores = [horovod.rendezvous_store(worker, cluster) for worker in (first, third)]
        with pytest.raises(tf.errors.DeadlineExceededError, match=r"workers \[1, 2\] have not"):
            horovod.wait_for_peers(stores[0], cluster, seconds=0.2)
        with pytest.raises(tf.errors.DeadlineExceededError, match=r"workers \[1\] have not"):
            horovod.wait_for_peers(stores[1], Cluster(2, 3, horovod=True), seconds=0.2)
        with pytest.raises(tf.errors.DeadlineExceededError, match=r"workers \[1\] have not"):
            horovod.wait_for_peers(stores[0], cluster, seconds=0.2)
    with pytest.raises(tf.errors.DeadlineExceededError, match="server at 127.* has not answered"):
        horovod.wait_for_peers(stores[0], cluster, seconds=0.2)


def test_one_process_waits_for_nobody() -> None:
    environ = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "nowhere", "HOROVOD_GLOO_RENDEZVOUS_PORT": "1"}
    assert horovod.rendezvous_store(environ, Cluster(0, 1)) is None
    assert horovod.rendezvous_store({}, Cluster(0, 2, horovod=True)) is None  # under mpirun


@pytest.mark.horovod
def test_the_rendezvous_server_stores_what_workers_say() -> None:
    from launch.local.horovod import Rendezvous, worker_environments

    rendezvous = Rendezvous(2)
    with rendezvous.serving():
        first, second = (
            horovod.rendezvous_store(environ, Cluster(rank, 2, horovod=True))
            for rank, environ in enumerate(worker_environments(2, rendezvous.port))
        )
        assert second.get("key") is None
        for value in ("1", "2"):
            first.put("key", value)
            assert second.get("key") == value
    with pytest.raises(OSError, match="refused"):
        second.get("key")


def test_each_process_takes_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, taken = ["first", "second"], []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *gpu: taken.append(gpu))
    horovod.use_gpu_of(1)
    assert taken == [("second", "GPU")]
    with pytest.raises(InputError, match="process 2 on this machine has none of the 2:"):
        horovod.use_gpu_of(2)
    gpus.clear()
    horovod.use_gpu_of(2)
    assert len(taken) == 1


def test_a_machine_whose_name_has_no_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    horovod.check_own_name()
    monkeypatch.setattr(socket, "gethostname", lambda: "nobody.invalid")
    with pytest.raises(InputError, match="own name, nobody.invalid: .*; add it to /etc/hosts"):
        horovod.check_own_name()
