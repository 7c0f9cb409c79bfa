"""What each worker gets in its environment."""

import json
import os
import sys
import threading

import pytest

from launch.local import horovod
from launch.local import workers as local

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
    inherited = {"OMP_NUM_THREADS": "7"}
    for additions in local.worker_environments(2, inherited):
        assert additions.keys().isdisjoint(inherited)
        assert "TF_NUM_INTRAOP_THREADS" in additions


def test_shell_commands_quote_and_remove_a_foreign_cluster():
    (line,) = local.shell_commands(["python", "--name=a b"], 1)
    assert line.startswith("env -u TF_CONFIG ")
    assert line.endswith(" python '--name=a b'")


def test_horovod_s_variables_take_the_place_of_a_cluster(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")  # of another job
    first, second = local.worker_environments(2, {}, rendezvous_port=7)
    assert "TF_CONFIG" not in first and "OMP_NUM_THREADS" in first
    different = {name for name in first if first[name] != second[name]}
    assert different == {"HOROVOD_RANK", "HOROVOD_LOCAL_RANK"}
    assert set(first) & set(horovod.VARIABLES) == set(horovod.VARIABLES) - {"HOROVOD_ELASTIC"}
    lines = local.shell_commands(["python"], 2, with_horovod=True)
    assert all(line.startswith("env -u TF_CONFIG -u HOROVOD_ELASTIC ") for line in lines)


@pytest.mark.timeout(60)
def test_a_worker_s_end_is_noticed_though_another_thread_took_the_signal(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def let_it_end(say):
        pipe.write_text("")
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # SIGCHLD comes while this thread is busy
        return False

    command = [sys.executable, "-c", "import sys; open(sys.argv[1]).read()", str(pipe)]
    done = threading.Event()
    other = threading.Thread(target=done.wait)  # it does not block SIGCHLD
    other.start()
    try:
        assert local.run_together(command, 1, 5.0, False, let_it_end).exit_code == 0
    finally:
        done.set()
        other.join()
