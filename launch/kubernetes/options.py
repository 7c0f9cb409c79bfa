"""The flags of --platform=k8s."""

import re
from dataclasses import dataclass

from data_pipelines.flag_fields import flag
from launch.platform import ClusterOptions, ElasticOptions

LONGEST_NAME = 40  # controllers append to it, and a pod's name must stay a DNS label of 63
_RFC_1035 = "[a-z]([-a-z0-9]*[a-z0-9])?"  # name of a Service, and so of a job
_RFC_1123 = "[a-z0-9]([-.a-z0-9]*[a-z0-9])?"
OVERLAYS = ("indexed-job", "jobset", "gpu-nodes", "mpijob", "trainjob", "elastic", "object-store")


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

    @property
    def kind(self) -> str:
        """The overlay, with its default."""
        usual = "mpijob" if self.with_horovod else "indexed-job"
        return self.overlay or ("elastic" if self.elastic else usual)

    @property
    def job_name(self) -> str:
        """The job's name, with its default."""
        return self.name or "warmstate"

    @property
    def node_labels(self) -> dict[str, str]:
        """The labels of --node_selector."""
        pairs = [pair.partition("=") for pair in (self.node_selector or "").split(",") if pair]
        return {key: value for key, _, value in pairs}

    def faults(self) -> list[str]:
        """Returns one line for each reason why there can be no such job."""
        kind, gpus, faults = self.kind, self.gpus_per_worker or 0, self.elastic_faults()
        if not re.fullmatch(_RFC_1035, self.job_name) or len(self.job_name) > LONGEST_NAME:
            faults.append(
                f"--name={self.name}: must be a-z, 0-9 and -, start with a letter, not end with -, "
                f"and have at most {LONGEST_NAME} characters"
            )
        for name in ("namespace", "run_volume", "data_volume", "queue"):
            if (value := getattr(self, name)) is not None and not re.fullmatch(_RFC_1123, value):
                faults.append(f"--{name}={value}: must be a name of a-z, 0-9, - and .")
        if not re.fullmatch("([^=,]+=[^=,]*(,|$))*", self.node_selector or ""):
            faults.append(f"--node_selector={self.node_selector}: must be key=value,key=value")
        if self.elastic != (kind == "elastic"):
            faults.append(f"--overlay={kind}: elastic, and no other, goes with --elastic")
        elif not self.elastic and self.with_horovod != (kind == "mpijob"):
            faults.append(
                f"--overlay={kind}: mpijob, and no other, goes with --distributor=horovod"
            )
        given = f"--gpus_per_worker={gpus}"
        if kind == "elastic" and gpus and not self.with_horovod:
            faults.append(
                f"{given}: workers of one pod share its GPUs only with --distributor=horovod"
            )
        if kind in ("mpijob", "elastic") and gpus > 1:
            faults.append(f"{given}: with Horovod a worker has one GPU; ask for more --workers")
        for name in ("run_volume", "data_volume") if kind == "object-store" else ():
            if value := getattr(self, name):
                faults.append(
                    f"--{name}={value} with --overlay=object-store: its pods have no shared volumes"
                )
        if kind == "trainjob" and self.max_restarts is not None:
            faults.append(
                f"--max_restarts={self.max_restarts}: with --overlay=trainjob the runtime sets it, "
                "in k8s/base/job.yaml"
            )
        return faults
