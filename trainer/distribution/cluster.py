"""Who am I and who are my peers: from what the platform put in the environment."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipelines.errors import InputError

HOROVOD_VARIABLES = ("HOROVOD_RANK", "HOROVOD_SIZE")


@dataclass(frozen=True)
class Cluster:
    """One process's place among its peers.

    Attributes:
      rank: this process's index, 0 is the chief.
      size: number of processes.
      addresses: "host:port" of every process, by rank; empty where TF_CONFIG does not name them.
      horovod: whether Horovod's launcher started the processes.
    """

    rank: int
    size: int
    addresses: tuple[str, ...] = ()
    horovod: bool = False


def resolve(environ: Mapping[str, str]) -> Cluster:
    """Returns the cluster that `environ` describes.

    | in the environment           | set by                                        |
    |------------------------------|-----------------------------------------------|
    | HOROVOD_RANK, HOROVOD_SIZE   | horovodrun, launch.main --distributor=horovod |
    | TF_CONFIG                    | launch.main, most platforms                   |
    | neither                      | nobody: a single process                      |

    Raises:
      InputError: what is there is not usable, or both are there.
    """
    tf_config = environ.get("TF_CONFIG", "").strip()
    horovod = {name: environ[name] for name in HOROVOD_VARIABLES if environ.get(name, "").strip()}
    if tf_config and horovod:
        raise InputError(
            f"TF_CONFIG and {', '.join(horovod)} are both set, so this process has two places "
            "among its peers; unset the one that another launcher left"
        )
    if horovod:
        return _of_horovod(horovod)
    if tf_config:
        return _of_tf_config(tf_config)
    return Cluster(rank=0, size=1)


def distributor_faults(kind: str, cluster: Cluster) -> list[str]:
    """Returns one line for each reason why --distributor=`kind` cannot run in this `cluster`."""
    if kind == "horovod" or (kind == "auto" and cluster.horovod):
        return _horovod_faults(cluster)
    if kind == "auto" or cluster.size == 1 and not cluster.horovod:
        return []
    names = "HOROVOD_SIZE" if cluster.horovod else "TF_CONFIG"
    fitting = "horovod" if cluster.horovod else "multi_worker"
    if kind == fitting:
        return []
    does = "finds its peers in TF_CONFIG" if kind == "multi_worker" else "runs in one process"
    return [
        f"--distributor={kind} {does}, but {names} names {cluster.size} workers; use "
        f"--distributor={fitting} or unset {names}"
    ]


def has_horovod() -> bool:
    """Returns whether this Python has Horovod; whether it loads is not tried."""
    return importlib.util.find_spec("horovod") is not None


def _horovod_faults(cluster: Cluster) -> list[str]:
    faults = []
    if not has_horovod():
        faults.append("--distributor=horovod: Horovod is not installed; `make horovod` builds it")
    if cluster.size > 1 and not cluster.horovod:
        faults.append(
            f"--distributor=horovod, but TF_CONFIG names the {cluster.size} workers; start them "
            "with launch.main --distributor=horovod (before the --) or with horovodrun"
        )
    return faults


def _of_horovod(variables: Mapping[str, str]) -> Cluster:
    try:
        rank, size = (int(variables[name]) for name in HOROVOD_VARIABLES)
    except (KeyError, ValueError):
        rank, size = -1, -1
    if not 0 <= rank < size:
        raise InputError(
            "HOROVOD_RANK and HOROVOD_SIZE must be numbers, 0 <= rank < size; set are "
            + " ".join(f"{name}={value!r}" for name, value in variables.items())
        )
    return Cluster(rank=rank, size=size, horovod=True)


def _of_tf_config(raw: str) -> Cluster:
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
    return Cluster(rank=rank, size=len(addresses), addresses=addresses)
