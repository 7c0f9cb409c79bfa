"""Workers as the pods of a Kubernetes job.

PyYAML and the Kubernetes client are imported only when this platform is used.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.kubernetes.options import KubernetesOptions
from launch.platform import Platform

if TYPE_CHECKING:
    from launch.kubernetes.api import Api


class Kubernetes(Platform[KubernetesOptions]):
    """Workers as the pods of a Kubernetes job."""

    options_class = KubernetesOptions
    action_flags = ("namespace",)

    def faults(self) -> list[str]:
        from launch.kubernetes import manifests

        faults = self.options.faults()
        if not manifests.MANIFESTS.is_dir():
            faults.append(
                f"--platform=k8s: there is no {manifests.MANIFESTS}; start it in a checkout, "
                "which has the manifests"
            )
        return faults

    def start(self, trainer_flags: Sequence[str]) -> int:
        from launch.kubernetes import jobs, manifests

        options = self.options
        names = {flag.partition("=")[0] for flag in trainer_flags}
        if options.kind == "object-store" and not names & {"--mirror", "--flagfile"}:
            return _fail("--overlay=object-store keeps nothing without the trainer's --mirror", 2)
        documents = manifests.render(options, trainer_flags)
        if options.dry_run:
            print(manifests.to_yaml(documents), end="")
            return 0
        (job,) = (each for each in documents if each["kind"] in manifests.JOB_KINDS)

        def create(api: "Api") -> int:
            code = jobs.start(documents, api)
            if code == 0 and (options.wait or options.follow):
                code = jobs.wait(job, api, options.follow)
            return code

        return self._with_api(create)

    def status(self, name: str) -> int:
        from launch.kubernetes import jobs

        return self._with_api(lambda api: jobs.status(name, api))

    def logs(self, name: str, follow: bool) -> int:
        from launch.kubernetes import jobs

        return self._with_api(lambda api: jobs.logs(name, api, follow))

    def cancel(self, name: str) -> int:
        from launch.kubernetes import jobs

        return self._with_api(lambda api: jobs.cancel(name, api))

    def _with_api(self, use: Callable[["Api"], int]) -> int:
        """Returns what `use` does; 2 without a cluster, 1 if it refuses, 69 if it is away."""
        from launch.kubernetes import jobs
        from launch.kubernetes.api import Api, explanation

        try:
            from kubernetes.config import ConfigException

            api = Api(self.options.namespace or "")
        except ImportError as error:
            return _fail(f"needs pip install -e '.[k8s]' in a clone of warmstate ({error})", 2)
        except ConfigException as error:
            return _fail(_no_cluster(error), 2)
        try:
            return use(api)
        except api.errors as error:
            code = jobs.UNREACHABLE_EXIT_CODE if api.is_outage(error) else 1
            return _fail(f"the API server: {explanation(error)}", code)


def _no_cluster(error: Exception) -> str:
    files = os.environ.get("KUBECONFIG") or "~/.kube/config"
    there = [name for name in files.split(os.pathsep) if Path(name).expanduser().is_file()]
    if not there:
        return f"there is no kubeconfig {files}: set KUBECONFIG, or run this in a pod"
    return f"the kubeconfig {files} names no cluster: {error}"


def _fail(reason: str, code: int) -> int:
    print(f"launch: --platform=k8s: {reason}", file=sys.stderr)
    return code
