import json

import pytest

from data_pipelines.errors import InputError
from trainer.distribution import cluster as clusters
from trainer.distribution.cluster import Cluster, distributor_faults, resolve


def tf_config(cluster: dict, kind: str, index: int) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def test_no_environment_is_a_single_process() -> None:
    assert resolve({}) == Cluster(0, 1)
    assert resolve({"TF_CONFIG": " "}) == Cluster(0, 1)


def test_workers() -> None:
    cluster = {"worker": ["a:1", "b:2", "c:3"]}
    assert resolve(tf_config(cluster, "worker", 2)) == Cluster(2, 3, ("a:1", "b:2", "c:3"))


def test_the_first_process_of_each_host() -> None:
    addresses = ("a:1", "a:2", "b:1", "[::1]:1", "[::1]:2")
    clusters = [Cluster(rank, len(addresses), addresses) for rank in range(len(addresses))]
    assert [each.is_first_of_host for each in clusters] == [True, False, True, True, False]
    assert Cluster(0, 2).is_first_of_host and not Cluster(1, 2).is_first_of_host


def test_a_chief_comes_before_the_workers() -> None:
    cluster = {"chief": ["a:1"], "worker": ["b:2"]}
    assert resolve(tf_config(cluster, "chief", 0)).rank == 0
    assert resolve(tf_config(cluster, "worker", 0)).rank == 1


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"TF_CONFIG": "{"}, "cannot be used"),
        ({"TF_CONFIG": "[]"}, "cannot be used"),
        ({"TF_CONFIG": '{"task": {"type": "worker", "index": 0}}'}, "cannot be used"),
        (tf_config({"worker": ["a:1"]}, "worker", 1), "only 1 workers"),
        (tf_config({"worker": ["a:1"]}, "worker", -1), "only 1 workers"),
        (tf_config({"worker": ["a:1"]}, "ps", 0), "'ps'"),
        ({"HOROVOD_RANK": "0"}, "HOROVOD_RANK='0'"),
        ({"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"}, "0 <= rank < size"),
        ({"HOROVOD_RANK": "one", "HOROVOD_SIZE": "2"}, "HOROVOD_RANK='one'"),
        (
            {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}
            | tf_config({"worker": ["a:1"]}, "worker", 0),
            "TF_CONFIG and HOROVOD_SIZE are both set.*rank 0 of 1 and rank 0 of 2",
        ),
    ],
)
def test_an_environment_that_is_half_there(environ: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(environ)


def test_horovod() -> None:
    environ = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3", "TF_CONFIG": ""}
    assert resolve(environ) == Cluster(1, 3, horovod=True)


# Of the second of three tasks on two nodes, as srun of SLURM 24.11 set them.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2,1",
}
# Of a batch script, or a command of salloc, with two tasks that srun has not started.
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}
INDEXED_JOB = {
    "WARMSTATE_HOSTS": "train-0.train,train-1.train",
    "WARMSTATE_PORT": "2222",
    "JOB_COMPLETION_INDEX": "1",
}
# As Kubeflow's trainer (v2) sets them, by its torch policy, in pods that are an Indexed Job's.
TRAIN_JOB = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "auto",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "mine-node-0-0.mine",
    "PET_MASTER_PORT": "29500",
    "JOB_COMPLETION_INDEX": "1",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_tasks_of_srun() -> None:
    for rank in (0, 1):
        environ = SRUN | {"SLURM_PROCID": str(rank)}
        assert resolve(environ) == Cluster(rank, 3, ("n1:23919", "n1:23920", "n2:23921"))
    third = SRUN | {"SLURM_PROCID": "2", "SLURM_NODEID": "1", "WARMSTATE_PORT": "5000"}
    assert resolve(third) == Cluster(2, 3, ("n1:5000", "n1:5001", "n2:5002"))


def test_srun_s_jobs_and_steps_get_ports_of_their_own_below_the_ephemeral_ones() -> None:
    def ports(job: int, step: int) -> set[str]:
        one = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        return {address.split(":")[1] for address in resolve(SRUN | one).addresses}

    assert ports(7, 0).isdisjoint(ports(8, 0)) and ports(7, 0).isdisjoint(ports(7, 1))
    assert all(20_000 <= int(p) < 32_000 for job in (0, 119, 120, 9_999_999) for p in ports(job, 0))


def test_jobs_of_srun_whose_numbers_differ_by_less_than_600_share_no_port() -> None:
    """With 8 tasks; jobs whose numbers differed by 120 shared them all."""
    tasks = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8"}
    node = {"SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0", "SLURM_PROCID": "1"}

    def ports(job: int) -> set[str]:
        return {*resolve(SRUN | tasks | node | {"SLURM_JOB_ID": str(job)}).addresses}

    first = ports(5_000)
    assert len(first) == 8
    assert [d for d in (*range(1, 600), 1000, 1200, 12_000 - 120) if first & ports(5_000 + d)] == []


@pytest.mark.parametrize(
    "environ",
    [
        BATCH,
        BATCH | {"SLURM_STEP_ID": "4294967291"},
        SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"},  # srun --ntasks=1
        {"WARMSTATE_NUM_WORKERS": "1", "JOB_COMPLETION_INDEX": "4"},
        {"WARMSTATE_HOSTS": "train-0.train", "JOB_COMPLETION_INDEX": "0"},
        TRAIN_JOB | {"PET_NNODES": "1", "PET_NODE_RANK": "0"},
    ],
)
def test_a_process_alone(environ: dict[str, str]) -> None:
    assert resolve(environ) == Cluster(0, 1)


def test_mpirun_counts_inside_the_step_that_it_starts_its_helpers_with() -> None:
    assert resolve(MPIRUN) == Cluster(1, 4, horovod=True)
    assert resolve(MPIRUN | SRUN) == Cluster(1, 4, horovod=True)


def test_an_indexed_job() -> None:
    assert resolve(INDEXED_JOB) == Cluster(1, 2, ("train-0.train:2222", "train-1.train:2222"))
    abbreviated = INDEXED_JOB | {"WARMSTATE_HOSTS": "train-[0-1].train"}
    assert resolve(abbreviated) == resolve(INDEXED_JOB)
    assert resolve(INDEXED_JOB | {"WARMSTATE_RANK": "0", "WARMSTATE_NUM_WORKERS": "2"}).rank == 0


def test_hosts_by_hand() -> None:
    environ = {"WARMSTATE_HOSTS": "a,b:7,a", "WARMSTATE_RANK": "2"}
    assert resolve(environ) == Cluster(2, 3, ("a:20000", "b:7", "a:20001"))


def test_a_train_job() -> None:
    hosts = ("mine-node-0-0.mine:20000", "mine-node-0-1.mine:20000")
    assert resolve(TRAIN_JOB) == Cluster(1, 2, hosts)


def test_two_platforms_that_agree() -> None:
    addresses = {"worker": ["a:1", "b:2"]}
    both = TRAIN_JOB | tf_config(addresses, "worker", 1)
    assert resolve(both) == Cluster(1, 2, ("a:1", "b:2"))
    assert resolve(both).named_by == "TF_CONFIG"


def test_an_inner_launcher_in_a_pod_or_step_of_one() -> None:
    inner = tf_config({"worker": ["a:1", "b:2"]}, "worker", 1)
    for outer in (BATCH, {"JOB_COMPLETION_INDEX": "0"}, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}):
        assert resolve(outer | inner) == Cluster(1, 2, ("a:1", "b:2"))


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        *((without(SRUN, name), f"lacks {name}") for name in clusters.SLURM_VARIABLES),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "contradict each other"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-3]"}, "contradict each other"),
        (SRUN | {"SLURM_PROCID": "3"}, "contradict each other"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST='n.1-' must be a list"),
        (SRUN | {"SLURM_NODEID": "1"}, "srun --distribution=block"),
        (SRUN | {"WARMSTATE_PORT": "0"}, "WARMSTATE_PORT='0'"),
        (SRUN | tf_config({"worker": ["a:1"]}, "worker", 0), "TF_CONFIG and SLURM_STEP_NUM_TASKS"),
        (SRUN | {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3"}, "HOROVOD_SIZE and SLURM_STEP_NUM_TASK"),
        (without(MPIRUN, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE must be numbers"),
        ({"PMIX_RANK": "0"}, "not how many"),
        ({"JOB_COMPLETION_INDEX": "3"}, "WARMSTATE_HOSTS does not name"),
        (without(INDEXED_JOB, "JOB_COMPLETION_INDEX"), "WARMSTATE_RANK must say which"),
        (INDEXED_JOB | {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX must say which"),
        (INDEXED_JOB | {"WARMSTATE_RANK": "x"}, "WARMSTATE_RANK must say which.*it is 'x'"),
        (INDEXED_JOB | {"WARMSTATE_NUM_WORKERS": "3"}, "WARMSTATE_NUM_WORKERS='3'"),
        ({"WARMSTATE_NUM_WORKERS": "3", "JOB_COMPLETION_INDEX": "0"}, "names 0 hosts"),
        *((without(TRAIN_JOB, name), name) for name in clusters.TRAIN_JOB_VARIABLES),
        (TRAIN_JOB | {"PET_NNODES": "1:4"}, "PET_NNODES='1:4'"),
        (TRAIN_JOB | {"PET_MASTER_ADDR": "10.0.0.1"}, "PET_MASTER_ADDR='10.0.0.1'"),
        (TRAIN_JOB | {"PET_MASTER_ADDR": "mine-node-0-0"}, "PET_MASTER_ADDR='mine-node-0-0'"),
        (SRUN | {"SLURM_JOB_ID": "x"}, "contradict each other"),
        (TRAIN_JOB | INDEXED_JOB | {"WARMSTATE_RANK": "0"}, "WARMSTATE_HOSTS and PET_NNODES"),
    ],
)
def test_a_platform_that_is_half_there_or_contradicts_another(
    environ: dict[str, str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        resolve(environ)


ALONE, BY_TF_CONFIG, BY_HOROVOD, ONE_BY_HOROVOD = (
    Cluster(0, 1),
    Cluster(0, 2, ("a:1", "b:2"), named_by="TF_CONFIG"),
    Cluster(0, 2, (), True, named_by="HOROVOD_SIZE"),
    Cluster(0, 1, (), True, named_by="HOROVOD_SIZE"),
)


@pytest.mark.parametrize(
    ("kind", "cluster", "says"),
    [
        ("multi_worker", BY_HOROVOD, "use --distributor=horovod or unset HOROVOD_SIZE"),
        ("mirrored", BY_HOROVOD, "runs in one process, but HOROVOD_SIZE names 2 workers"),
        ("multi_worker", ONE_BY_HOROVOD, "use --distributor=horovod or unset HOROVOD_SIZE"),
        ("one_device", BY_TF_CONFIG, "use --distributor=multi_worker or unset TF_CONFIG"),
        ("horovod", BY_TF_CONFIG, "launch.main --distributor=horovod (before the --)"),
    ],
)
def test_a_distributor_that_does_not_fit(
    kind: str, cluster: Cluster, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "has_horovod", lambda: True)
    (fault,) = distributor_faults(kind, cluster)
    assert says in fault


def test_distributors_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "has_horovod", lambda: True)
    fitting = [
        *((kind, ALONE) for kind in ("auto", "one_device", "mirrored", "multi_worker", "horovod")),
        *((kind, BY_TF_CONFIG) for kind in ("auto", "multi_worker")),
        *((kind, BY_HOROVOD) for kind in ("auto", "horovod")),
    ]
    assert not [each for each in fitting if distributor_faults(*each)]


@pytest.mark.parametrize(("kind", "cluster"), [("horovod", ALONE), ("auto", BY_HOROVOD)])
def test_without_horovod_one_line_says_how_to_get_it(
    kind: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "has_horovod", lambda: False)
    assert distributor_faults(kind, cluster) == [
        "--distributor=horovod: Horovod is not installed; `make horovod` builds it"
    ]
