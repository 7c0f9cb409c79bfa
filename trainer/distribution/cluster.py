"""Finds this process's rank and its peers in the platform's environment variables."""

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from data_pipelines.errors import InputError
from trainer.distribution.node_list import expand_counts, expand_hosts

HOROVOD_VARIABLES = ("HOROVOD_RANK", "HOROVOD_SIZE")
OPEN_MPI_VARIABLES = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
SLURM_VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID", "SLURM_NODEID"),
)
TRAIN_JOB_VARIABLES = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR")
DEFAULT_PORT = 20_000
# SLURM jobs use ports from DEFAULT_PORT, below Linux's ephemeral ports (from 32,768).
_SLURM_PORTS = 12_000
# Coprime to _SLURM_PORTS and at its golden section: job numbers that are close get ports far apart.
_SLURM_PORTS_BETWEEN_JOBS = 7_417
_SLURM_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # of a batch script or salloc's shell, not of srun


@dataclass(frozen=True)
class Cluster:
    """A process's place among its peers."""

    rank: int  # index of this process; 0 is the chief
    size: int  # number of processes
    addresses: tuple[str, ...] = ()  # "host:port" by rank; () if the platform names none
    horovod: bool = False  # whether a launcher for Horovod started them
    # The variable with the number of processes; empty for a single process.
    named_by: str = field(default="", compare=False)

    @property
    def is_first_of_host(self) -> bool:
        """Whether no process before this one runs on the same host; the chief always is."""
        hosts = [address.rpartition(":")[0] for address in self.addresses]
        return hosts.index(hosts[self.rank]) == self.rank if hosts else self.rank == 0


def resolve(environ: Mapping[str, str]) -> Cluster:
    """Returns the cluster that `environ` describes; of several platforms', the first.

    | in the environment                     | set by                                        |
    |----------------------------------------|-----------------------------------------------|
    | TF_CONFIG                              | launch.main, Kubeflow's TFJob, many others    |
    | HOROVOD_RANK, _SIZE                    | horovodrun, launch.main --distributor=horovod |
    | OMPI_COMM_WORLD_RANK, _SIZE            | mpirun (MPIJob), for Horovod                  |
    | WARMSTATE_HOSTS, and WARMSTATE_RANK or | by hand; the manifests of Indexed Job, JobSet |
    |   JOB_COMPLETION_INDEX                 |   (the index is Kubernetes's)                 |
    | PET_NNODES, _NODE_RANK, _MASTER_ADDR   | TrainJob with a torch policy                  |
    | SLURM_STEP_ID, SLURM_STEP_*            | srun                                          |
    | none of them                           | (a single process)                            |

    WARMSTATE_HOSTS lists the hosts of all processes by rank, in SLURM's notation: "w-[0-3].job" or
    "a,b:2222". A host without a port gets WARMSTATE_PORT (default 20000); a repeated host gets the
    next ports. WARMSTATE_NUM_WORKERS is an optional check of their number; 1 needs no hosts.
    WARMSTATE_RANK takes precedence over JOB_COMPLETION_INDEX.

    Under SLURM only `srun` with at least 2 tasks makes peers: a process in a batch script or an
    interactive allocation is alone, whatever SLURM_NTASKS says. Tasks get ports by rank, from
    WARMSTATE_PORT, or else from a port that the job's and the step's number give.

    Raises:
        InputError: The variables are unusable, incomplete or contradictory.
    """
    readers = (
        *(_of_tf_config, partial(_of_two_numbers, HOROVOD_VARIABLES)),
        *(partial(_of_two_numbers, OPEN_MPI_VARIABLES), _of_hosts, _of_train_job, _of_slurm),
    )
    found = [cluster for read in readers if (cluster := read(environ))]
    if not found:
        _check_alone(environ)
        return Cluster(rank=0, size=1)
    first = found[0]
    for other in found[1:]:
        if other != Cluster(first.rank, first.size, other.addresses, first.horovod):
            raise InputError(
                f"{first.named_by} and {other.named_by} are both set and give this process two "
                f"places among its peers, rank {first.rank} of {first.size} and rank {other.rank} "
                f"of {other.size}; unset the one that another launcher left"
            )
    return first


def distributor_faults(kind: str, cluster: Cluster) -> list[str]:
    """Returns a line for each reason why --distributor=`kind` cannot run in this `cluster`."""
    if kind == "horovod" or (kind == "auto" and cluster.horovod):
        return _horovod_faults(cluster)
    if kind == "auto" or (cluster.size == 1 and not cluster.horovod):
        return []
    fitting = "horovod" if cluster.horovod else "multi_worker"
    if kind == fitting:
        return []
    does = "needs its peers' addresses" if kind == "multi_worker" else "runs in one process"
    return [
        f"--distributor={kind} {does}, but {cluster.named_by} names {cluster.size} workers; use "
        f"--distributor={fitting} or unset {cluster.named_by}"
    ]


def has_horovod() -> bool:
    """Returns whether Horovod is installed, without loading it."""
    return importlib.util.find_spec("horovod") is not None


def _horovod_faults(cluster: Cluster) -> list[str]:
    faults = []
    if not has_horovod():
        faults.append("--distributor=horovod: Horovod is not installed; `make horovod` builds it")
    if cluster.size > 1 and not cluster.horovod:
        faults.append(
            f"--distributor=horovod, but {cluster.named_by} names the {cluster.size} workers; "
            "start them with launch.main --distributor=horovod (before the --) or with horovodrun"
        )
    return faults


def _of_tf_config(environ: Mapping[str, str]) -> Cluster | None:
    raw = environ.get("TF_CONFIG", "").strip()
    if not raw:
        return None
    try:
        config = json.loads(raw)
        task_type = config["task"]["type"]
        index = int(config["task"]["index"])
        chiefs = tuple(config["cluster"].get("chief", ()))
        workers = tuple(config["cluster"].get("worker", ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"TF_CONFIG is set and cannot be used ({error!r}); it must hold "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}, '
            f"but it is {raw!r}"
        ) from error
    addresses = chiefs + workers
    rank = index + (len(chiefs) if task_type == "worker" else 0)
    if task_type not in ("chief", "worker"):
        raise InputError(f"TF_CONFIG names the task type {task_type!r}; known: chief, worker")
    if not 0 <= rank < len(addresses):
        raise InputError(
            f"TF_CONFIG says that this is {task_type} {index}, but its cluster has only "
            f"{len(addresses)} workers: {list(addresses)}"
        )
    return Cluster(rank, len(addresses), addresses, named_by="TF_CONFIG")


def _of_two_numbers(names: tuple[str, str], environ: Mapping[str, str]) -> Cluster | None:
    variables = _given(environ, names)
    if not variables:
        return None
    rank, size = (_whole(variables.get(name, "")) for name in names)
    if not 0 <= rank < size:
        raise InputError(
            f"{' and '.join(names)} must be numbers, 0 <= rank < size; set are {_shown(variables)}"
        )
    return Cluster(rank, size, horovod=True, named_by=names[1])


def _of_hosts(environ: Mapping[str, str]) -> Cluster | None:
    raw_hosts = environ.get("WARMSTATE_HOSTS", "").strip()
    hosts = expand_hosts(raw_hosts, "WARMSTATE_HOSTS") if raw_hosts else []
    declared = environ.get("WARMSTATE_NUM_WORKERS", "").strip()
    if declared not in ("", str(len(hosts))) and (hosts or declared != "1"):
        raise InputError(
            f"WARMSTATE_NUM_WORKERS={declared!r}, but WARMSTATE_HOSTS={raw_hosts!r} names "
            f"{len(hosts)} hosts"
        )
    if not hosts:
        return None
    ranks = _given(environ, ["WARMSTATE_RANK", "JOB_COMPLETION_INDEX"])
    name, raw = next(iter(ranks.items()), ("WARMSTATE_RANK", ""))
    rank = _whole(raw)
    if not 0 <= rank < len(hosts):
        raise InputError(
            f"WARMSTATE_HOSTS={raw_hosts!r} names {len(hosts)} hosts, and {name} must say which of "
            f"them this is, as a number from 0 on; it is {raw!r}"
        )
    if len(hosts) == 1:
        return None
    addresses = _with_ports(hosts, _port(environ))
    return Cluster(rank, len(hosts), addresses, named_by="WARMSTATE_HOSTS")


def _of_train_job(environ: Mapping[str, str]) -> Cluster | None:
    variables = _given(environ, TRAIN_JOB_VARIABLES)
    if not variables or variables.get("PET_NNODES") == "1":
        return None
    size, rank = (_whole(variables.get(name, "")) for name in TRAIN_JOB_VARIABLES[:2])
    # The chief's pod is <job>-node-0-0.<job>; the other names differ in the last number.
    pod, dot, domain = variables.get("PET_MASTER_ADDR", "").partition(".")
    if not (0 <= rank < size and pod.endswith("-0") and dot):
        raise InputError(
            "a TrainJob sets PET_NNODES and PET_NODE_RANK, numbers with 0 <= rank < nodes, and "
            f"PET_MASTER_ADDR, such as job-node-0-0.job; set are {_shown(variables)}"
        )
    hosts = [f"{pod[:-1]}{index}.{domain}" for index in range(size)]
    # Not PET_MASTER_PORT: torch's launcher uses it.
    addresses = _with_ports(hosts, _port(environ))
    return Cluster(rank, size, addresses, named_by="PET_NNODES")


def _of_slurm(environ: Mapping[str, str]) -> Cluster | None:
    step = _whole(environ.get("SLURM_STEP_ID", ""))
    # mpirun starts a helper on each node with srun; its processes inherit the helper's variables.
    by_mpirun = bool(_given(environ, OPEN_MPI_VARIABLES))
    if by_mpirun or not 0 <= step < _SLURM_FIRST_SPECIAL_STEP:
        return None
    variables = _given(environ, SLURM_VARIABLES)
    if variables.get("SLURM_STEP_NUM_TASKS") == "1":
        return None
    if missing := [name for name in SLURM_VARIABLES if name not in variables]:
        raise InputError(
            f"SLURM_STEP_ID={step} says that srun started this process, but it lacks "
            f"{', '.join(missing)}; pass on all of SLURM's variables, or unset SLURM_STEP_ID for "
            "a process alone"
        )
    job, size, rank, node = (
        _whole(variables[name])
        for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NODEID")
    )
    nodes = expand_hosts(variables["SLURM_STEP_NODELIST"], "SLURM_STEP_NODELIST")
    counts = expand_counts(variables["SLURM_STEP_TASKS_PER_NODE"], "SLURM_STEP_TASKS_PER_NODE")
    if job < 0 or len(nodes) != len(counts) or sum(counts) != size or not 0 <= rank < size:
        raise InputError(f"SLURM's variables contradict each other: {_shown(variables)}")
    node_of_rank = [index for index, count in enumerate(counts) for _ in range(count)]
    if node_of_rank[rank] != node:
        raise InputError(
            f"SLURM's task {rank} runs on node {node} of {variables['SLURM_STEP_NODELIST']}, not "
            f"on node {node_of_rank[rank]}: the addresses are known only if each node's tasks "
            "follow each other; start with srun --distribution=block"
        )
    addresses = tuple(
        f"{nodes[index]}:{port}"
        for index, port in zip(node_of_rank, _slurm_ports(environ, job + step, size), strict=True)
    )
    return Cluster(rank, size, addresses, named_by="SLURM_STEP_NUM_TASKS")


def _slurm_ports(environ: Mapping[str, str], number: int, size: int) -> list[int]:
    """Returns a port for each task; `number` keeps jobs on the same node apart."""
    if _given(environ, ["WARMSTATE_PORT"]):
        return [_port(environ) + rank for rank in range(size)]
    offset = _SLURM_PORTS_BETWEEN_JOBS * number
    return [DEFAULT_PORT + (offset + rank) % _SLURM_PORTS for rank in range(size)]


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raises InputError if the environment implies peers without naming them."""
    if _given(environ, ["JOB_COMPLETION_INDEX"]) and not _given(
        environ, ["WARMSTATE_HOSTS", "WARMSTATE_NUM_WORKERS", "PET_NNODES"]
    ):
        raise InputError(
            f"JOB_COMPLETION_INDEX={environ['JOB_COMPLETION_INDEX']} says that this is a pod of an "
            "Indexed Job, but WARMSTATE_HOSTS does not name the pods' hosts; for a pod that works "
            "alone set WARMSTATE_NUM_WORKERS=1"
        )
    in_slurm = _given(environ, ["SLURM_STEP_ID"])  # srun sets PMIX_RANK too, and names the peers
    if _given(environ, ["PMIX_RANK"]) and not in_slurm:
        raise InputError(
            f"PMIX_RANK={environ['PMIX_RANK']} says that there are peers, but not how many; start "
            "with srun, or with Open MPI's mpirun (OMPI_COMM_WORLD_SIZE), or set WARMSTATE_HOSTS "
            "and WARMSTATE_RANK"
        )


def _with_ports(hosts: Iterable[str], first_port: int) -> tuple[str, ...]:
    earlier: Counter[str] = Counter()
    addresses = []
    for host in hosts:
        addresses.append(host if ":" in host else f"{host}:{first_port + earlier[host]}")
        earlier[host] += 1
    return tuple(addresses)


def _port(environ: Mapping[str, str]) -> int:
    raw = environ.get("WARMSTATE_PORT", "").strip() or str(DEFAULT_PORT)
    if not 0 < _whole(raw) < 65_536:
        raise InputError(f"WARMSTATE_PORT={raw!r} must be a port, 1 to 65535")
    return int(raw)


def _given(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Returns the variables that are set and not empty, in the order of `names`."""
    return {name: environ[name].strip() for name in names if environ.get(name, "").strip()}


def _shown(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in variables.items())


def _whole(text: str) -> int:
    """Returns the whole number in `text`, or -1."""
    return int(text) if text.strip().isascii() and text.strip().isdigit() else -1
