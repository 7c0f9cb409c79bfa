"""Why the pods of a job do not run: from their conditions and from events, with what to do."""

import datetime
import re
from collections.abc import Iterator

from launch.kubernetes.api import Api
from launch.kubernetes.manifests import Document

_NODE_IS_LOST_SECONDS = 30  # after the time by which a pod should have been gone
_STARTING = ("ContainerCreating", "PodInitializing")
# What to do, by a part of the message; the first that is found counts.
_REMEDIES = {
    "exceeded quota": "ask for fewer --workers, or for a larger quota (kubectl describe quota)",
    "per Container is": "the namespace's LimitRange allows less than k8s/base/job.yaml asks for",
    "per Pod is": "the namespace's LimitRange allows less than k8s/base/job.yaml asks for",
    "violates PodSecurity": "the namespace forbids it; the manifests as they are obey `restricted`",
    "no storage class is set": "set a default storage class, or --run_volume and --data_volume",
    "persistentvolumeclaim": "create the claim, or leave --run_volume and --data_volume out",
    "unbound immediate PersistentVolumeClaims": "kubectl describe pvc says what its volume lacks",
    "nvidia.com/gpu": "no node has so many free GPUs: check --gpus_per_worker",
    "Insufficient": "no node has room: ask for fewer --workers, or wait for other jobs",
    "node affinity/selector": "no node has these labels: check --node_selector",
    "taint": "the nodes are reserved or unwell (kubectl describe node)",
    "no nodes available": "the cluster has no node that can run pods",
    "no PriorityClass": "an administrator applies k8s/cluster/priority-class.yaml",
    "rdma/": "no node offers that RDMA resource: see k8s/overlays/gpu-nodes/settings.yaml",
    "ImagePull": "check --image, and that the nodes may pull it (imagePullSecrets)",
    "InvalidImageName": "check --image",
}


def problems(job: Document, selector: str, api: Api) -> list[str]:
    """Returns one line for each reason why pods of the job do not run.

    Args:
        selector: Labels of the job's pods.
    """
    found = [*_of_pods(api.pods(selector, fieldSelector="status.phase=Pending", limit="50"))]
    if job.get("status", {}).get("terminating"):
        found += [line for pod in api.pods(selector) if (line := lost_node(pod))]
    return list(dict.fromkeys([*found, *_of_events(job, api)]))


def lost_node(pod: Document) -> str:
    """Returns a line if the pod should be gone for long, as when its node is lost, else ""."""
    end = pod["metadata"].get("deletionTimestamp")  # with the grace period in it
    if not end or _age_seconds(end) < _NODE_IS_LOST_SECONDS:
        return ""
    node = pod["spec"].get("nodeName", "NODE")
    return (
        f"{pod['metadata']['name']} should have ended at {end}, and is not replaced before it has: "
        f"node {node} may be lost. If the machine is off: kubectl taint node {node} "
        "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    )


def pending_reason(pod: Document) -> str:
    """Returns why a pod does not run yet, "" if it is about to."""
    status = pod["status"]
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason", ""))
    for container in status.get("containerStatuses", []):
        waiting = container["state"].get("waiting", {})
        if waiting.get("reason") and waiting["reason"] not in _STARTING:
            return f"{waiting['reason']}: {waiting.get('message', '')}".removesuffix(": ")
    return ""


def _of_pods(pods: list[Document]) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for pod in pods:
        if reason := pending_reason(pod):
            names.setdefault(reason, []).append(pod["metadata"]["name"])
    for reason, pending in names.items():
        others = f" and {len(pending) - 1} more" if len(pending) > 1 else ""
        yield f"{pending[0]}{others} cannot start: {_with_remedy(reason)}"


def _of_events(job: Document, api: Api) -> Iterator[str]:
    name, began = job["metadata"]["name"], job["metadata"].get("creationTimestamp", "")
    for event in api.events("reason=FailedCreate"):
        of = event["involvedObject"]["name"]
        is_new = (event.get("lastTimestamp") or event.get("eventTime") or began) >= began
        if is_new and (of == name or of.startswith(f"{name}-")):
            # The pod's name is another at each attempt.
            message = re.sub(r'pods? "[^"]*"', "a pod", event["message"])
            yield f"{event['involvedObject']['kind']} {of}: {_with_remedy(message)}"
    claims = set(re.findall(r"'claimName': '([^']+)'", str(job.get("spec", {}))))
    for event in api.events("involvedObject.kind=PersistentVolumeClaim"):
        of = event["involvedObject"]["name"]
        if of in claims and event["reason"] in ("FailedBinding", "ProvisioningFailed"):
            yield f"claim {of}: {_with_remedy(event['message'])}"


def _with_remedy(message: str) -> str:
    remedy = next((words for part, words in _REMEDIES.items() if part in message), "")
    return f"{' '.join(message.split())}{f' -> {remedy}' if remedy else ''}"


def _age_seconds(timestamp: str) -> float:
    now = datetime.datetime.now(datetime.UTC)
    return (now - datetime.datetime.fromisoformat(timestamp)).total_seconds()
