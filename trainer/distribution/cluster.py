"""Who am I and who are my peers: from what the platform put in the environment."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipelines.errors import InputError


@dataclass(frozen=True)
class Cluster:
    """One process's place among its peers.

    Attributes:
      rank: this process's index, 0 is the chief.
      size: number of processes.
      addresses: "host:port" of every process, by rank; empty for a single process.
    """

    rank: int
    size: int
    addresses: tuple[str, ...] = ()


def resolve(environ: Mapping[str, str]) -> Cluster:
    """Returns the cluster that `environ` describes: TF_CONFIG, or else a single process.

    Raises:
      InputError: TF_CONFIG is there and is not usable.
    """
    raw = environ.get("TF_CONFIG", "")
    if not raw.strip():
        return Cluster(rank=0, size=1)
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
