"""Workers as the pods of a Kubernetes job.

PyYAML and the Kubernetes client are imported only when this platform is used.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipelines.flag_fields import flag
from launch.platform import ClusterOptions, ElasticOptions, Platform

if TYPE_CHECKING:
    from launch.kubernetes.jobs import Api
    from launch.kubernetes.manifests import Options

OVERLAYS = ("indexed-job", "jobset", "mpijob", "trainjob", "elastic")


@dataclass(frozen=True)
class KubernetesOptions(ElasticOptions, ClusterOptions):
    """Flags of --platform=k8s."""

    # fmt: off
    overlay: str | None = flag("Kubernetes", None, "Kind of job. Default: indexed-job; mpijob with "
        "Horovod; elastic with --elastic.",
        choices=OVERLAYS)
    node_selector: str | None = flag("Kubernetes", None, "Labels of the nodes to run on: "
        "key=value,key=value.")
    namespace: str | None = flag("Kubernetes", None, "Namespace of the job. Default: that of the "
        "kubeconfig's context.")
    image: str | None = flag("Kubernetes", None, "Image made from k8s/Dockerfile. Default: that of "
        "the manifests.")
    run_volume: str | None = flag("Kubernetes", None, "Existing claim to mount at runs/. Default: "
        "warmstate-runs, which is created.")
    data_volume: str | None = flag("Kubernetes", None, "Existing claim to mount at /data. Default: "
        "warmstate-data, which is created.")
    queue: str | None = flag("Kubernetes", None, "Local queue of Kueue, which decides when the job "
        "starts.")
    # fmt: on


class Kubernetes(Platform[KubernetesOptions]):
    """Workers as the pods of a Kubernetes job."""

    options_class = KubernetesOptions
    action_flags = ("namespace",)

    def faults(self) -> list[str]:
        from launch.kubernetes import manifests

        options, overlay, faults = self.options, self._overlay(), self.options.elastic_faults()
        if not manifests.MANIFESTS.is_dir():
            faults.append(
                f"--platform=k8s: there is no {manifests.MANIFESTS}; start it in a checkout, "
                "which has the manifests"
            )
        if options.elastic != (overlay == "elastic"):
            faults.append(f"--overlay={overlay}: elastic, and no other, goes with --elastic")
        elif not options.elastic and options.with_horovod != (overlay == "mpijob"):
            faults.append(
                f"--overlay={overlay}: mpijob, and no other, goes with --distributor=horovod"
            )
        if not re.fullmatch("([^=,]+=[^=,]*(,|$))*", options.node_selector or ""):
            faults.append(f"--node_selector={options.node_selector}: must be key=value,key=value")
        return faults + self._job(()).faults()

    def start(self, trainer_flags: Sequence[str]) -> int:
        from launch.kubernetes import jobs, manifests

        options = self.options
        documents = manifests.render(self._job(trainer_flags))
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

    def _job(self, trainer_flags: Sequence[str]) -> "Options":
        from launch.kubernetes import manifests

        options = self.options
        pairs = [pair.partition("=") for pair in (options.node_selector or "").split(",") if pair]
        return manifests.Options(
            overlay=self._overlay(),
            name=options.name or "warmstate",
            namespace=options.namespace or "",
            image=options.image or "",
            workers=options.workers or (options.max_workers if options.elastic else None) or 1,
            min_workers=options.min_workers or 1,
            max_workers=options.max_workers or 1,
            with_horovod=options.with_horovod,
            gpus_per_worker=options.gpus_per_worker or 0,
            run_volume=options.run_volume or "",
            data_volume=options.data_volume or "",
            queue=options.queue or "",
            node_selector={key: value for key, _, value in pairs},
            max_restarts=options.max_restarts,
            trainer_flags=trainer_flags,
        )

    def _overlay(self) -> str:
        usual = "mpijob" if self.options.with_horovod else "indexed-job"
        return self.options.overlay or ("elastic" if self.options.elastic else usual)

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
