"""Replays what the controllers of JobSet, TrainJob, MPIJob and Kueue do with our manifests.

No controller runs here. This is what their sources and their own tests say, read in 2026 at JobSet
v0.12, Kubeflow Trainer v2.3, MPI operator v0.8 and Kueue v0.19: which objects they make, with which
labels and environment; when pods are made, deleted and made again; what a suspension does. What
they check, refuse or report in their status is left out. pod_runner.py runs the pods.
"""

import copy
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.integration import pod_runner
from tests.integration.pod_runner import Controller, IndexedJob, Kubelet, Pod

Document = dict[str, Any]
JOB_SET = "jobset.sigs.k8s.io/jobset-name"
MPI_JOB = "training.kubeflow.org/job-name"
MPI_ROLE = "training.kubeflow.org/job-role"


def job_of_job_set(job_set: Document) -> tuple[Document, Document]:
    """Returns the Job and the headless Service that JobSet makes of one replicated job.

    JobSet v0.12, pkg/controllers/jobset_controller.go: constructJob, createHeadlessSvcIfNecessary.
    """
    name, spec = job_set["metadata"]["name"], job_set["spec"]
    (replicated,) = spec["replicatedJobs"]
    assert replicated["replicas"] == 1 and spec["network"]["enableDNSHostnames"]
    subdomain = spec["network"].get("subdomain", name)
    labels = {
        JOB_SET: name,
        "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
        "jobset.sigs.k8s.io/job-index": "0",
        "jobset.sigs.k8s.io/restart-attempt": "0",
    }
    job_spec = copy.deepcopy(replicated["template"]["spec"]) | {"suspend": spec["suspend"]}
    template = job_spec["template"]
    template["metadata"] = {"labels": template["metadata"]["labels"] | labels}
    template["spec"]["subdomain"] = subdomain
    metadata = {"name": f"{name}-{replicated['name']}-0", "labels": labels}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job_spec}
    service = {
        "kind": "Service",
        "metadata": {"name": subdomain},
        "spec": {
            "clusterIP": "None",
            "selector": {JOB_SET: name},
            "publishNotReadyAddresses": spec["network"]["publishNotReadyAddresses"],
        },
    }
    return job, service


def job_set_of_train_job(train_job: Document, runtime: Document) -> Document:
    """Returns the JobSet that Trainer makes of a TrainJob and its runtime.

    Trainer v2.3, pkg/runtime/core/trainingruntime.go (runtimePatches, resourcesPerNode) and
    pkg/runtime/framework/plugins/jobset (args, image, env, numNodes, suspend).
    """
    spec, trainer = train_job["spec"], train_job["spec"]["trainer"]
    assert spec["runtimeRef"]["name"] == runtime["metadata"]["name"]
    made = copy.deepcopy(runtime["spec"]["template"]["spec"])
    for patch in spec.get("runtimePatches", ()):
        made = merged(made, patch["trainingRuntimeSpec"]["template"]["spec"])
    (node,) = made["replicatedJobs"]
    assert node["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    job = node["template"]["spec"]
    job["completions"] = job["parallelism"] = trainer["numNodes"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["name"] == "node"
    container |= {key: trainer[key] for key in ("image", "args") if key in trainer}
    container["resources"] = merged(container["resources"], trainer.get("resourcesPerNode", {}))
    # In place where the runtime has the name, else at the end.
    values = {each["name"]: each for each in container["env"]}
    container["env"] = [*(values | {each["name"]: each for each in trainer["env"]}).values()]
    made["suspend"] = spec["suspend"]
    return {"kind": "JobSet", "metadata": {"name": train_job["metadata"]["name"]}, "spec": made}


def merged(base: Any, patch: Any) -> Any:
    """Returns a strategic merge: mappings by key, lists of named items by name, else the patch."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {k: merged(base.get(k), patch.get(k, base.get(k))) for k in {**base, **patch}}
    if isinstance(base, list) and all("name" in item for item in [*base, *patch]):
        items = {item["name"]: item for item in base}
        for item in patch:
            items[item["name"]] = merged(items.get(item["name"]), item)
        return [*items.values()]
    return patch


def admit(job: Document, node_labels: Mapping[str, str]) -> None:
    """Lets a suspended job of any kind start on nodes with the labels that Kueue chose.

    Kueue v0.19, pkg/podset/podset.go: Merge, and RunWithPodSetsInfo of each kind.

    Raises:
        ValueError: The job asks for another node. Kueue then does not start it.
    """
    kind, spec = job["kind"], job["spec"]
    if kind == "TrainJob":
        pod = {"spec": {"template": {"spec": {"nodeSelector": dict(node_labels)}}}}
        runtime = {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": pod}]}}}
        patch = {"manager": "kueue.x-k8s.io/manager", "trainingRuntimeSpec": runtime}
        spec.setdefault("runtimePatches", []).append(patch)
    for template in _pod_templates(job):
        selector = template["spec"].setdefault("nodeSelector", {})
        for key, value in node_labels.items():
            if selector.setdefault(key, value) != value:
                raise ValueError(f"conflict for {key}: {selector[key]} and {value}")
    spec.get("runPolicy", spec)["suspend"] = False


def _pod_templates(job: Document) -> list[Document]:
    kind, spec = job["kind"], job["spec"]
    if kind == "MPIJob":
        return [each["template"] for each in spec["mpiReplicaSpecs"].values()]
    if kind == "JobSet":
        return [each["template"]["spec"]["template"] for each in spec["replicatedJobs"]]
    return [spec["template"]] if kind == "Job" else []


class MpiJob(Controller):
    """An MPIJob and its operator, v0.8: pkg/controller/mpi_job_controller.go.

    Attributes:
        workers: Pods of the workers that were not deleted, by index.
        launcher: The Job that makes the launcher's pods, once there is one.
    """

    def __init__(self, mpi_job: Document, kubelet: Kubelet):
        super().__init__(kubelet)
        self._name, self._spec = mpi_job["metadata"]["name"], mpi_job["spec"]
        self._policy = self._spec["runPolicy"]
        self.workers: dict[int, Pod] = {}
        self.launcher: IndexedJob | None = None

    def start(self) -> None:
        """Makes the workers, and the launcher when they are ready; nothing while suspended."""
        if self._policy["suspend"]:
            return
        assert self._spec["launcherCreationPolicy"] == "WaitForWorkersReady"
        for index in range(self._spec["mpiReplicaSpecs"]["Worker"]["replicas"]):
            self._make_worker(index)
        for worker in self.workers.values():
            self.kubelet.wait_until_ready(worker)
        if self.launcher is None:
            self.launcher = _Launcher(self._launcher_job(), self)
            self.launcher.start()
        else:
            self.launcher.resume()

    def suspend(self) -> None:
        """Suspends the launcher's Job and deletes the workers that run."""
        self._policy["suspend"] = True
        self.launcher.suspend()
        self._delete_workers()

    def resume(self) -> None:
        """Does what Kueue does when there is room."""
        self._policy["suspend"] = False
        self.start()

    def note_end(self, pod: Pod) -> None:
        """Makes a deleted worker again. A worker that has failed stays as it is."""
        if self.launcher and pod in self.launcher.pods:
            self.launcher.note_end(pod)
            if self.launcher.condition and self.condition is None:
                self.condition = self.launcher.condition
                if self._policy["cleanPodPolicy"] == "Running":
                    self._delete_workers()
        elif pod.deleted:
            del self.workers[pod.index]
            if self.condition is None and not self._policy["suspend"]:
                self._make_worker(pod.index)

    def _delete_workers(self) -> None:
        for worker in self.workers.values():
            if worker.exit_code is None and not worker.deleted:
                self.delete(worker)

    def _make_worker(self, index: int) -> None:
        replica = self._spec["mpiReplicaSpecs"]["Worker"]
        manifest = self._pod(replica, f"{self._name}-worker-{index}", "worker")
        manifest["metadata"]["labels"]["training.kubeflow.org/replica-index"] = str(index)
        self.workers[index] = self.kubelet.run(manifest, index)

    def _launcher_job(self) -> Document:
        name = f"{self._name}-launcher"
        template = self._pod(self._spec["mpiReplicaSpecs"]["Launcher"], name, "launcher")
        container, volumes = template["spec"]["containers"][0], template["spec"]["volumes"]
        container["env"] += [
            {"name": "OMPI_MCA_orte_default_hostfile", "value": "/etc/mpi/hostfile"},
            {"name": "NVIDIA_VISIBLE_DEVICES"},
            {"name": "NVIDIA_DRIVER_CAPABILITIES"},
        ]
        volumes.append({"name": "mpi-job-config", "configMap": {"name": f"{self._name}-config"}})
        container["volumeMounts"].append({"name": "mpi-job-config", "mountPath": "/etc/mpi"})
        spec = {"backoffLimit": self._policy["backoffLimit"], "template": template}
        return {"kind": "Job", "metadata": {"name": name}, "spec": spec}

    def _pod(self, replica: Document, name: str, role: str) -> Document:
        """Returns a pod with what the operator adds to the template of either role."""
        made = copy.deepcopy(replica["template"])
        labels = {
            "training.kubeflow.org/operator-name": "mpi-operator",
            MPI_JOB: self._name,
            MPI_ROLE: role,
        }
        made["metadata"] = {"name": name, "labels": made["metadata"]["labels"] | labels}
        spec = made["spec"]
        spec |= {"hostname": name, "subdomain": self._name}
        spec["restartPolicy"] = replica["restartPolicy"]
        (container,) = spec["containers"]
        container.setdefault("env", []).append({"name": "K_MPI_JOB_ROLE", "value": role})
        spec["volumes"].append({"name": "ssh-auth", "secret": {"secretName": f"{self._name}-ssh"}})
        container["volumeMounts"].append(
            {"name": "ssh-auth", "mountPath": self._spec["sshAuthMountPath"]}
        )
        return made


class _Launcher(IndexedJob):
    """The launcher's Job. Its pause before a new pod lasts until the workers are ready."""

    def __init__(self, job: Document, mpi_job: MpiJob):
        super().__init__(job, mpi_job.kubelet)
        self._mpi_job = mpi_job

    def _make_pod(self, index: int) -> None:
        workers = self._mpi_job.workers
        for worker in [each for each in workers.values() if each.deleted]:
            self._mpi_job.wait_until(lambda worker=worker: workers.get(worker.index) is not worker)
        for worker in workers.values():
            if worker.exit_code is None:
                self.kubelet.wait_until_ready(worker)
        super()._make_pod(index)


def objects_of_mpi_job(mpi_job: Document) -> tuple[Document, dict[str, str]]:
    """Returns the Service, and the ConfigMap's data, that the operator makes of an MPIJob."""
    name, replicas = mpi_job["metadata"]["name"], mpi_job["spec"]["mpiReplicaSpecs"]["Worker"]
    selector = {"training.kubeflow.org/operator-name": "mpi-operator", MPI_JOB: name}
    service = {
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"clusterIP": "None", "selector": selector, "publishNotReadyAddresses": False},
    }
    hosts = [
        f"{name}-worker-{index}.{name}.{pod_runner.NAMESPACE}.svc"
        for index in range(replicas["replicas"])
    ]
    slots = mpi_job["spec"]["slotsPerWorker"]
    data = {
        "hostfile": "".join(f"{host} slots={slots}\n" for host in hosts),
        "discover_hosts.sh": "#!/bin/sh\n" + "".join(f"echo {host}\n" for host in hosts),
    }
    return service, data


def write_mpi_objects(mpi_job: Document, folder: Path) -> dict[str, Path]:
    """Writes the ConfigMap and the Secret with a new key; returns their folders by name."""
    name = mpi_job["metadata"]["name"]
    folders = {f"{name}-{suffix}": folder / suffix for suffix in ("config", "ssh")}
    for each in folders.values():
        each.mkdir(parents=True)
    for file, text in objects_of_mpi_job(mpi_job)[1].items():
        (folder / "config" / file).write_text(text)
    key = folder / "ssh" / "id_rsa"
    make_key = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-N", "", "-f", key]
    subprocess.run(make_key, check=True)
    key.with_name("authorized_keys").write_bytes(key.with_suffix(".pub").read_bytes())
    return folders
