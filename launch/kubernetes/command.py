"""The launcher's flags for --platform=k8s, and what it does with them.

PyYAML and the Kubernetes client are imported only where this platform is asked for.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from launch.kubernetes.jobs import Api
    from launch.kubernetes.manifests import Options

_OVERLAY = flags.DEFINE_string(
    "overlay",
    None,
    "k8s: kind of job, indexed-job (default), jobset, mpijob (default with Horovod), trainjob or "
    "elastic (--elastic, and no other)",
)
_NODE_SELECTOR = flags.DEFINE_string("node_selector", None, "k8s: key=value,key=value of the nodes")
_TEXTS = [
    flags.DEFINE_string(name, None, f"k8s: {text}")
    for name, text in (
        ("namespace", "where the job goes, default that of the kubeconfig's context"),
        ("image", "made from k8s/Dockerfile, default the manifest's"),
        ("run_volume", "claim mounted at runs/; default warmstate-runs, which is made"),
        ("data_volume", "claim mounted at /data; default warmstate-data, which is made"),
        ("queue", "Kueue's local queue, which then decides when the job starts"),
    )
]
_FLAGS = (_OVERLAY, _NODE_SELECTOR, *_TEXTS)


def given_flags() -> list[str]:
    """Returns this module's flags that were given, for platforms that have no use for them."""
    return [f"--{flag.name}={flag.value}" for flag in _FLAGS if flag.value is not None]


def value_faults(with_horovod: bool, elastic: bool, **given: object) -> list[str]:
    """Returns one line for each flag with which no job can be made.

    Args:
      given: see `options_of_flags`; without what is not a number and should be.
    """
    from launch.kubernetes import manifests as kubernetes

    faults = []
    if not kubernetes.MANIFESTS.is_dir():
        faults.append(
            f"--platform=k8s: there is no {kubernetes.MANIFESTS}; start it in a checkout, "
            "which has the manifests"
        )
    if kubernetes.parse_node_selector(_NODE_SELECTOR.value or "") is None:
        faults.append(f"--node_selector={_NODE_SELECTOR.value}: must be key=value,key=value")
    overlay = _overlay(with_horovod, elastic)
    if elastic != (overlay == "elastic"):
        faults.append(f"--overlay={overlay}: elastic, and no other, goes with --elastic")
    elif not elastic and with_horovod != (overlay == "mpijob"):
        faults.append(f"--overlay={overlay}: mpijob, and no other, goes with --distributor=horovod")
    return faults + options_of_flags(with_horovod, elastic, **given).faults()


def options_of_flags(with_horovod: bool, elastic: bool, **given: object) -> "Options":
    """Returns the job that the flags ask for.

    Args:
      given: attributes of `Options` that other flags than this module's say; None leaves a default.
    """
    from launch.kubernetes import manifests as kubernetes

    texts = {flag.name: flag.value for flag in _TEXTS}
    values: dict[str, Any] = {k: v for k, v in (texts | given).items() if v is not None}
    return kubernetes.Options(
        overlay=_overlay(with_horovod, elastic),
        node_selector=kubernetes.parse_node_selector(_NODE_SELECTOR.value or "") or {},
        with_horovod=with_horovod,
        **values,
    )


def run(options: "Options", dry_run: bool, wait: bool, follow: bool) -> int:
    """Creates the job, or prints its manifests; returns the exit code."""
    from launch.kubernetes import jobs as kubernetes_jobs
    from launch.kubernetes import manifests as kubernetes

    documents = kubernetes.render(options)
    if dry_run:
        print(kubernetes.to_yaml(documents), end="")
        return 0
    (job,) = (each for each in documents if each["kind"] in kubernetes.JOB_KINDS)

    def create(api: "Api") -> int:
        code = kubernetes_jobs.submit(documents, api)
        if code == 0 and (wait or follow):
            code = kubernetes_jobs.wait(job, api, follow)
        return code

    return _with_api(options.namespace, create)


def act(action: str, name: str, follow: bool) -> int:
    """Does `action` (status, logs, cancel) with the job of that name; returns the exit code."""
    from launch.kubernetes import jobs as kubernetes_jobs

    doings = {
        "status": kubernetes_jobs.status,
        "logs": lambda name, api: kubernetes_jobs.logs(name, api, follow),
        "cancel": kubernetes_jobs.cancel,
    }
    return _with_api(_namespace(), lambda api: doings[action](name, api))


def _with_api(namespace: str, use: Callable[["Api"], int]) -> int:
    """Returns what `use` does; 2 if there is no way to a cluster, 1 if the cluster refuses."""
    from launch.kubernetes import jobs as kubernetes_jobs

    try:
        from kubernetes.config import ConfigException

        api = kubernetes_jobs.Api(namespace)
    except ImportError as error:
        print(
            f"launch: --platform=k8s: needs pip install -e '.[k8s]' in a clone of "
            f"warmstate ({error})",
            file=sys.stderr,
        )
        return 2
    except ConfigException as error:
        print(f"launch: --platform=k8s: KUBECONFIG names no cluster: {error}", file=sys.stderr)
        return 2
    try:
        return use(api)
    except api.errors as error:
        reason = kubernetes_jobs.explanation(error)
        print(f"launch: --platform=k8s: the API server: {reason}", file=sys.stderr)
        return 1


def _namespace() -> str:
    (flag,) = (flag for flag in _TEXTS if flag.name == "namespace")
    return flag.value or ""


def _overlay(with_horovod: bool, elastic: bool) -> str:
    usual = "mpijob" if with_horovod else "indexed-job"
    return _OVERLAY.value or ("elastic" if elastic else usual)
