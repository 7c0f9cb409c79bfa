"""Jobs at the API server: creates what manifests.py renders, follows and ends it."""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from launch.kubernetes.manifests import JOB_KINDS, Document

# The chief's last line where WARMSTATE_PRINT_REPORT is set; horovodrun puts something before it.
_REPORT = re.compile(r"report\.json: (\{.*\})\s*$")
_REPORT_IS_IN_LAST_LINES = 200
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class _Kind:
    """How a kind of job says that it has ended, and which pods are its.

    Attributes:
      succeeded: type of the condition.
      pods, chief: label selectors, {} stands for the job's name.
    """

    api_version: str
    succeeded: str
    pods: str
    chief: str


_INDEX = "batch.kubernetes.io/job-completion-index"
_OF_JOB = "batch.kubernetes.io/job-name={}"
_OF_JOB_SET = "jobset.sigs.k8s.io/jobset-name={}"
_OF_MPI_JOB = "training.kubeflow.org/job-name={}"
# Who makes others of them comes first: a TrainJob has a JobSet of its name.
_KINDS = {
    "TrainJob": _Kind(
        "trainer.kubeflow.org/v1alpha1", "Complete", _OF_JOB_SET, f"{_OF_JOB_SET},{_INDEX}=0"
    ),
    "JobSet": _Kind(
        "jobset.x-k8s.io/v1alpha2", "Completed", _OF_JOB_SET, f"{_OF_JOB_SET},{_INDEX}=0"
    ),
    "MPIJob": _Kind(
        "kubeflow.org/v2beta1",
        "Succeeded",
        _OF_MPI_JOB,
        f"{_OF_MPI_JOB},training.kubeflow.org/job-role=launcher",
    ),
    "Job": _Kind("batch/v1", "Complete", _OF_JOB, f"{_OF_JOB},{_INDEX}=0"),
}


class Api:
    """The API server that the kubeconfig (or, in a pod, the service account) names.

    Attributes:
      errors: what its methods raise where the server refuses something or cannot be reached.

    Raises:
      ImportError: the extra `warmstate[k8s]` is not installed.
      kubernetes.config.ConfigException: there is no configuration.
    """

    def __init__(self, namespace: str):
        from kubernetes import client, config
        from urllib3.exceptions import HTTPError

        try:
            config.load_kube_config()
            context = config.list_kube_config_contexts()[1]["context"]
        except config.ConfigException:
            config.load_incluster_config()
            context = {}
        self.namespace = namespace or context.get("namespace", "default")
        self._core = client.CoreV1Api()
        self._batch = client.BatchV1Api()
        self._custom = client.CustomObjectsApi()
        self._error = client.ApiException
        self.errors = (client.ApiException, HTTPError)

    def create(self, document: Document) -> bool:
        """Creates an object, with no unknown field let pass; returns False if it is there."""
        strict: dict[str, Any] = {"body": document, "field_validation": "Strict"}
        kind = document["kind"]
        try:
            if kind == "Service":
                self._core.create_namespaced_service(self.namespace, **strict)
            elif kind == "PersistentVolumeClaim":
                self._core.create_namespaced_persistent_volume_claim(self.namespace, **strict)
            elif kind == "Job":
                self._batch.create_namespaced_job(self.namespace, **strict)
            elif kind == "ClusterTrainingRuntime":
                self._custom.create_cluster_custom_object(*_resource(document), **strict)
            else:
                group, version, plural = _resource(document)
                self._custom.create_namespaced_custom_object(
                    group, version, self.namespace, plural, **strict
                )
        except self._error as error:
            if error.status == 409:
                return False
            raise
        return True

    def find_job(self, name: str) -> Document | None:
        """Returns the job of that name, of whatever kind; None if there is none."""
        for kind, facts in _KINDS.items():
            document: Document = {
                "apiVersion": facts.api_version,
                "kind": kind,
                "metadata": {"name": name},
            }
            try:
                return document | self.get(document)
            except self._error as error:
                if error.status != 404:  # so it is where the kind itself is not known
                    raise
        return None

    def get(self, document: Document) -> Document:
        """Returns the job that `document` names, as it is now."""
        group, version, plural = _resource(document)
        found = self._custom.get_namespaced_custom_object(
            group, version, self.namespace, plural, document["metadata"]["name"]
        )
        return cast(Document, found)

    def delete(self, document: Document) -> None:
        """Deletes the job that `document` names, its pods, and its Service."""
        group, version, plural = _resource(document)
        name = document["metadata"]["name"]
        self._custom.delete_namespaced_custom_object(
            group, version, self.namespace, plural, name, propagation_policy="Background"
        )
        if document["kind"] == "Job":  # the other kinds' controllers made theirs
            # It answers with the Service or a Status, of which the client knows the one.
            answer = self._core.delete_namespaced_service(
                name, self.namespace, _preload_content=False
            )
            if answer.status != 404:
                self._check(answer)

    def pods(self, selector: str) -> list[Any]:
        """Returns the pods, oldest first."""
        pods = self._core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return sorted(pods, key=lambda pod: pod.metadata.creation_timestamp)

    def log_lines(self, pod: str, follow: bool) -> Iterator[str]:
        """Yields the lines that the pod has printed, with `follow` until it ends."""
        # Not read into memory, and so not the str that the client's types promise.
        stream: Any = self._core.read_namespaced_pod_log(
            pod, self.namespace, follow=follow, _preload_content=False
        )
        self._check(stream)
        for line in stream:
            yield line.decode(errors="replace")

    def last_lines(self, pod: str) -> list[str]:
        """Returns the last lines that the pod has printed."""
        response: Any = self._core.read_namespaced_pod_log(
            pod, self.namespace, tail_lines=_REPORT_IS_IN_LAST_LINES, _preload_content=False
        )
        self._check(response)
        return response.data.decode(errors="replace").splitlines()

    def _check(self, response: Any) -> None:
        """Raises what the client raises itself where it reads the answer."""
        if response.status >= 300:
            raise self._error(response.status, response.reason, body=response.data.decode())


def _resource(document: Document) -> tuple[str, str, str]:
    group, version = document["apiVersion"].split("/")
    return group, version, document["kind"].lower() + "s"


def submit(documents: Sequence[Document], api: Api) -> int:
    """Creates what is not there yet; returns 1 if the job itself is, else 0."""
    for document in documents:
        title = f"{document['kind']} {document['metadata']['name']}"
        if api.create(document):
            _say(f"created {title}")
        elif document["kind"] in JOB_KINDS:
            _say(f"{title} is there already: choose another --name, or `launch cancel` it")
            return 1
        else:
            _say(f"{title} is there already")
    return 0


def wait(job: Document, api: Api, follow: bool) -> int:
    """Waits until the job has ended.

    With `follow` prints what its chief prints, and writes the report to NAME-report.json.

    Returns the exit code: 0, or 1 after saying what the failed pods said.
    """
    kind, name = _KINDS[job["kind"]], job["metadata"]["name"]
    chief = _Chief(api, kind.chief.format(name))
    while True:
        conditions = _conditions(api.get(job))
        # After the last look at the conditions: a chief that ended with the job is read as well.
        if follow:
            chief.print_lines()
        if kind.succeeded in conditions:
            _say(f"{job['kind']} {name} is complete")
            if follow:
                chief.fetch_report(Path(f"{name}-report.json"))
            return 0
        if "Failed" in conditions:
            _say(f"{job['kind']} {name} failed: {conditions['Failed'].get('message', '')}")
            for pod in api.pods(kind.pods.format(name)):
                _say_why_failed(pod)
            return 1
        time.sleep(_POLL_SECONDS)


class _Chief:
    """The pods that were the chief one after the other, and what was printed of each."""

    def __init__(self, api: Api, selector: str):
        self._api = api
        self._selector = selector
        self._printed: dict[str, int] = {}  # lines
        self._read: set[str] = set()

    def print_lines(self) -> None:
        """Prints what is new, of a pod that runs until it ends."""
        for pod in self._api.pods(self._selector):
            name, phase = pod.metadata.name, pod.status.phase
            if phase == "Pending" or name in self._read:
                continue
            try:
                for number, line in enumerate(self._api.log_lines(name, follow=True)):
                    if number >= self._printed.get(name, 0):
                        self._printed[name] = number + 1
                        _print_line(line)
            except self._api.errors as error:
                _say(f"{name}: its lines cannot be read: {explanation(error)}")
            if phase in ("Succeeded", "Failed"):
                self._read.add(name)

    def fetch_report(self, file: Path) -> None:
        """Writes the report that the last chief printed."""
        for pod in reversed(self._api.pods(self._selector)):
            for line in reversed(self._api.last_lines(pod.metadata.name)):
                if found := _REPORT.search(line):
                    file.write_text(json.dumps(json.loads(found[1]), indent=2) + "\n")
                    _say(f"report: {file}")
                    return
        _say("no report: the chief printed none (is its image an older one?)")


def status(name: str, api: Api) -> int:
    """Prints how the job and its pods are; returns 1 if there is none, else 0."""
    job = api.find_job(name)
    if job is None:
        return _no_such_job(name, api)
    print(f"{job['kind']} {name}: {_state(job)}")
    for pod in api.pods(_KINDS[job["kind"]].pods.format(name)):
        code = _exit_code(pod)
        ended = "" if code is None else f", exit code {code}"
        print(f"  {pod.metadata.name}: {pod.status.phase}{ended}")
    return 0


def logs(name: str, api: Api, should_follow: bool) -> int:
    """Prints what the chief's pods printed, with `should_follow` until the job has ended."""
    job = api.find_job(name)
    if job is None:
        return _no_such_job(name, api)
    if should_follow:
        return wait(job, api, follow=True)
    for pod in api.pods(_KINDS[job["kind"]].chief.format(name)):
        if pod.status.phase != "Pending":
            for line in api.log_lines(pod.metadata.name, follow=False):
                _print_line(line)
    return 0


def cancel(name: str, api: Api) -> int:
    """Deletes the job; its pods save their state first, and the volumes stay."""
    job = api.find_job(name)
    if job is None:
        return _no_such_job(name, api)
    api.delete(job)
    print(f"{job['kind']} {name}: deleted; its pods save their state and stop, its volumes stay")
    return 0


def explanation(error: Exception) -> str:
    """Returns one line that says what the API server, or the way to it, has against a request."""
    body = getattr(error, "body", None)
    try:
        message = json.loads(body)["message"] if body else ""
    except (ValueError, KeyError, TypeError):
        message = str(body)
    return " ".join(str(message or getattr(error, "reason", "") or error).split())


def _conditions(job: Document) -> Mapping[str, Document]:
    """Returns the conditions that are true, by type."""
    conditions = job.get("status", {}).get("conditions", [])
    return {each["type"]: each for each in conditions if each["status"] == "True"}


def _state(job: Document) -> str:
    conditions = _conditions(job)
    if _KINDS[job["kind"]].succeeded in conditions:
        return "complete"
    if "Failed" in conditions:
        return f"failed: {conditions['Failed'].get('message', '')}"
    policy = job["spec"].get("runPolicy", job["spec"])  # of an MPIJob
    if policy.get("suspend"):
        return "suspended, waits for its queue"
    return "has not ended"


def _exit_code(pod: Any) -> int | None:
    for container in pod.status.container_statuses or []:
        if container.state.terminated:
            return container.state.terminated.exit_code
    return None


def _print_line(line: str) -> None:
    if not _REPORT.search(line):
        print(line, end="" if line.endswith("\n") else "\n", flush=True)


def _say_why_failed(pod: Any) -> None:
    for container in pod.status.container_statuses or []:
        ended = container.state.terminated
        if ended and ended.exit_code:
            _say(f"{pod.metadata.name} exited with code {ended.exit_code}: {ended.message or ''}")


def _no_such_job(name: str, api: Api) -> int:
    kinds = ", ".join(_KINDS)
    _say(f"the namespace {api.namespace} has no {kinds} named {name}")
    return 1


def _say(line: str) -> None:
    print(f"launch: {line.rstrip()}", file=sys.stderr, flush=True)
