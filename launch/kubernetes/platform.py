"""Workers as the pods of a Kubernetes job.

PyYAML and the Kubernetes client are imported only when this platform is used.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from launch.kubernetes.options import KubernetesOptions
from launch.platform import Platform

if TYPE_CHECKING:
    from launch.kubernetes.jobs import Api


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
        documents = manifests.render(options, trainer_flags)
        if options.dry_run:
            print(manifests.to_yaml(documents), end="")
            return 0
        (job,) = (each for each in documents if each["kind"] in manifests.JOB_KINDS)

        def create(api: "Api") -> int:
            code = jobs.submit(documents, api)
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
        """Returns what `use` does; 2 if no cluster is configured, 1 if the cluster refuses."""
        from launch.kubernetes import jobs

        try:
            from kubernetes.config import ConfigException

            api = jobs.Api(self.options.namespace or "")
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
            reason = jobs.explanation(error)
            print(f"launch: --platform=k8s: the API server: {reason}", file=sys.stderr)
            return 1
