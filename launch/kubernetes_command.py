"""The launcher's flags for --platform=k8s, and what it does with them.

PyYAML and the Kubernetes client are imported only where this platform is asked for.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from launch.kubernetes import Options

_OVERLAY = flags.DEFINE_string(
    "overlay",
    None,
    "k8s: kind of job, indexed-job (default), jobset, mpijob (default with Horovod) or trainjob",
)
_NODE_SELECTOR = flags.DEFINE_string("node_selector", None, "k8s: key=value,key=value of the nodes")
_TEXTS = [
    flags.DEFINE_string(name, None, f"k8s: {text}")
    for name, text in (
        ("name", "of the job in the cluster, default warmstate"),
        ("namespace", "where the job goes, default that of the kubeconfig's context"),
        ("image", "made from k8s/Dockerfile, default the manifest's"),
        ("run_volume", "claim mounted at runs/; default warmstate-runs, which is made"),
        ("data_volume", "claim mounted at /data; default warmstate-data, which is made"),
        ("queue", "Kueue's local queue, which then decides when the job starts"),
    )
]
_WAIT = flags.DEFINE_bool("wait", None, "k8s: return when the job has ended, with its exit code")
_FOLLOW = flags.DEFINE_bool("follow", None, "k8s: --wait, and print what the chief prints")
_FLAGS = (_OVERLAY, _NODE_SELECTOR, *_TEXTS, _WAIT, _FOLLOW)


def given_flags() -> list[str]:
    """Returns this module's flags that were given, for platforms that have no use for them."""
    return [f"--{flag.name}={flag.value}" for flag in _FLAGS if flag.value is not None]


def value_faults(
    with_horovod: bool, gpus_per_worker: int = 0, max_restarts: int | None = None
) -> list[str]:
    """Returns one line for each flag with which no job can be made."""
    from launch import kubernetes

    faults = []
    if kubernetes.parse_node_selector(_NODE_SELECTOR.value or "") is None:
        faults.append(f"--node_selector={_NODE_SELECTOR.value}: must be key=value,key=value")
    if with_horovod != (_overlay(with_horovod) == "mpijob"):
        faults.append(
            f"--overlay={_overlay(with_horovod)}: mpijob, and no other, goes with "
            "--distributor=horovod"
        )
    options = options_of_flags(with_horovod, 1, gpus_per_worker, max_restarts)
    return faults + options.faults()


def options_of_flags(
    with_horovod: bool,
    workers: int = 1,
    gpus_per_worker: int = 0,
    max_restarts: int | None = None,
    trainer_flags: Sequence[str] = (),
) -> "Options":
    """Returns the job that the flags ask for."""
    from launch import kubernetes

    return kubernetes.Options(
        **{flag.name: flag.value for flag in _TEXTS if flag.value is not None},
        overlay=_overlay(with_horovod),
        node_selector=kubernetes.parse_node_selector(_NODE_SELECTOR.value or "") or {},
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        max_restarts=max_restarts,
        trainer_flags=trainer_flags,
    )


def run(options: "Options", dry_run: bool) -> int:
    """Creates the job, or prints its manifests; returns the exit code."""
    from launch import kubernetes

    documents = kubernetes.render(options)
    if dry_run:
        print(kubernetes.to_yaml(documents), end="")
        return 0
    try:
        api = kubernetes.Api(options.namespace)
    except ImportError as error:
        print(f"launch: --platform=k8s: pip install 'warmstate[k8s]' ({error})", file=sys.stderr)
        return 2
    code = kubernetes.submit(documents, api)
    if code == 0 and (_WAIT.value or _FOLLOW.value):
        code = kubernetes.wait(documents, api, bool(_FOLLOW.value))
    return code


def _overlay(with_horovod: bool) -> str:
    return _OVERLAY.value or ("mpijob" if with_horovod else "indexed-job")
