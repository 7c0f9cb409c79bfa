"""What each worker gets in its environment."""

import json
import os

import pytest

from launch import local

CORES = len(os.sched_getaffinity(0))


def test_each_worker_finds_itself_in_the_same_cluster():
    configs = [json.loads(e["TF_CONFIG"]) for e in local.worker_environments(50, {})]
    addresses = configs[0]["cluster"]["worker"]
    assert all(config["cluster"] == {"worker": addresses} for config in configs)
    assert [c["task"] for c in configs] == [{"type": "worker", "index": i} for i in range(50)]
    hosts, ports = zip(*(address.split(":") for address in addresses), strict=True)
    assert set(hosts) == {"127.0.0.1"}
    assert len(set(ports)) == 50


def test_one_worker_has_no_cluster():
    (additions,) = local.worker_environments(1, {"TF_CONFIG": "of another job"})
    assert "TF_CONFIG" not in additions


@pytest.mark.parametrize("workers", [1, 2, CORES + 1])
def test_cores_are_divided_among_the_workers(workers):
    expected = {name: str(max(1, CORES // workers)) for name in local.THREAD_VARIABLES}
    for additions in local.worker_environments(workers, {}):
        assert additions.items() >= expected.items()


def test_variables_that_the_user_has_set_stay():
    inherited = {"OMP_NUM_THREADS": "7", "TF_CPP_MIN_LOG_LEVEL": "0"}
    for additions in local.worker_environments(2, inherited):
        assert additions.keys().isdisjoint(inherited)
        assert "TF_NUM_INTRAOP_THREADS" in additions


def test_shell_commands_quote_and_remove_a_foreign_cluster():
    (line,) = local.shell_commands(["python", "--name=a b"], 1)
    assert line.startswith("env -u TF_CONFIG ")
    assert line.endswith(" python '--name=a b'")
