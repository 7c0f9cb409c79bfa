"""Jobs at the API server: starts what manifests.py renders, follows it and ends it."""

import json
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.kubernetes.api import CLUSTER_WIDE, Api, Refusal, explanation
from launch.kubernetes.manifests import JOB_KINDS, Document
from launch.kubernetes.problems import lost_node, pending_reason, problems

UNREACHABLE_EXIT_CODE = 69  # EX_UNAVAILABLE: the job may still run
# The chief's last line if WARMSTATE_PRINT_REPORT is set; horovodrun puts a prefix before it.
_REPORT = re.compile(r"report\.json: (\{.*\})\s*$")
_REPORT_IS_IN_LAST_LINES = "200"
_POLL_SECONDS = 2.0
_PROBLEMS_SECONDS = 10.0  # between two looks at pending pods and events
_OUTAGE_SECONDS = 300.0  # an API server that is away for longer ends --wait
_DELETION_SECONDS = 300.0  # a job that is deleted is waited for so long before it is started again
_OURS = ("app.kubernetes.io/name", "warmstate")
# Which data a claim holds is the user's: it stays when the job goes.
_OWNED = {"Service": "v1", "ConfigMap": "v1", "NetworkPolicy": "networking.k8s.io/v1"}


@dataclass(frozen=True)
class _Kind:
    """How a kind of job tells that it has ended, and the labels of its pods.

    Attributes:
        succeeded: Type of the condition.
        pods, chief: Label selectors; {} stands for the job's name.
    """

    api_version: str
    succeeded: str
    pods: str
    chief: str


_INDEX = "batch.kubernetes.io/job-completion-index"
_OF_JOB = "batch.kubernetes.io/job-name={}"
_OF_JOB_SET = "jobset.sigs.k8s.io/jobset-name={}"
_OF_MPI_JOB = "training.kubeflow.org/job-name={}"
# A TrainJob makes a JobSet of its name, and a JobSet makes Jobs: the makers come first.
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


def start(documents: Sequence[Document], api: Api) -> int:
    """Creates the objects; if one is refused, deletes those that were created.

    Returns:
        0, or 1 if the name is taken.

    Raises:
        Api.errors: The server refuses an object or cannot be reached.
    """
    (job,) = (each for each in documents if each["kind"] in JOB_KINDS)
    if not _name_is_free(documents, job, api):
        return 1
    created: list[Document] = []
    try:
        for document in documents:
            if _exists(document, api):
                continue
            created.append(document | api.create(document))
            _say(f"created {_title(document)}")
        owner = next(each for each in created if each["kind"] == job["kind"])
        for document in documents:
            if document["kind"] in _OWNED:
                api.own(document, owner)
    except api.errors:
        for document in reversed(created):
            api.delete(document)
            _say(f"deleted {_title(document)} again")
        raise
    return 0


def _exists(document: Document, api: Api) -> bool:
    try:
        found = api.get(document) is not None
    except Refusal as error:
        # What is the cluster's, only an administrator may see and create.
        if document["kind"] not in CLUSTER_WIDE or error.status != 403:
            raise
        _say(f"{_title(document)} may not be seen; an administrator must have created it")
        return True
    if found:
        _say(f"{_title(document)} is there already")
    return found


def _name_is_free(documents: Sequence[Document], job: Document, api: Api) -> bool:
    for document in documents:
        found = api.get(document) if document["kind"] in _OWNED else None
        if found and not _is_ours(found):
            _say(f"{_title(document)} is there, and not of warmstate: choose another --name")
            return False
    found = api.get(job)
    if found and found["metadata"].get("deletionTimestamp"):
        _say(f"{_title(job)} is being deleted; waiting until its pods have ended")
        limit = time.monotonic() + _DELETION_SECONDS
        while found and time.monotonic() < limit:
            time.sleep(_POLL_SECONDS)
            found = api.get(job)
    if found:
        _say(f"{_title(job)} is there already: choose another --name, or `launch cancel` it")
    return found is None


def wait(job: Document, api: Api, follow: bool) -> int:
    """Waits until the job has ended; prints why its pods do not run, if they do not.

    With `follow` prints what its chief prints, and writes the report to NAME-report.json.

    Returns:
        0; 1 after printing what the failed pods said; 69 if the API server is away for minutes.
    """
    kind, name = _KINDS[job["kind"]], job["metadata"]["name"]
    chief = _Chief(api, kind.chief.format(name))
    watch = _ProblemWatch(api, kind.pods.format(name))
    outage = _Outage()
    while True:
        try:
            found = api.get(job)
            if found is None:
                _say(f"{_title(job)} was deleted")
                return 1
            found = job | found
            ended = kind.succeeded in _conditions(found) or "Failed" in _conditions(found)
            if follow:
                chief.look(is_last=ended)
            if ended:
                return _end(found, api, chief if follow else None)
            watch.look(found)
            outage.is_over()
        except api.errors as error:
            if not api.is_outage(error):
                raise
            if not outage.may_end(explanation(error)):
                return UNREACHABLE_EXIT_CODE
        time.sleep(_POLL_SECONDS)


def _end(job: Document, api: Api, chief: "_Chief | None") -> int:
    kind, name, conditions = _KINDS[job["kind"]], job["metadata"]["name"], _conditions(job)
    if kind.succeeded in conditions:
        _say(f"{_title(job)} is complete")
        if chief:
            chief.fetch_report(Path(f"{name}-report.json"))
        return 0
    _say(f"{_title(job)} failed: {conditions['Failed'].get('message', '')}")
    for pod in api.pods(kind.pods.format(name)):
        for container in pod["status"].get("containerStatuses", []):
            ended = container["state"].get("terminated", {})
            if code := ended.get("exitCode"):
                said = ended.get("message", "")
                _say(f"{pod['metadata']['name']} exited with code {code}: {said}")
    return 1


class _Outage:
    """The time since the API server was last reached."""

    def __init__(self) -> None:
        self._began: float | None = None

    def may_end(self, reason: str) -> bool:
        """Returns whether to try again after a request that failed for `reason`."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            _say(f"the API server is away ({reason}); the job continues; trying again")
        if now - self._began < _OUTAGE_SECONDS:
            return True
        _say(
            f"the API server was away for {_OUTAGE_SECONDS:.0f} s. The job may still run: "
            "`launch logs NAME --follow` later"
        )
        return False

    def is_over(self) -> None:
        """Notes that a request was answered."""
        if self._began is not None:
            _say(f"the API server is back after {time.monotonic() - self._began:.0f} s")
        self._began = None


class _ProblemWatch:
    """Prints each reason why pods do not run once."""

    def __init__(self, api: Api, selector: str):
        self._api, self._selector = api, selector
        self._said: set[str] = set()
        self._next = 0.0

    def look(self, job: Document) -> None:
        """Looks for problems, at most every ten seconds and only while pods are missing."""
        status, wanted = job.get("status", {}), job["spec"].get("parallelism")
        all_run = job["kind"] == "Job" and wanted and status.get("ready") == wanted
        if all_run or _is_suspended(job) or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PROBLEMS_SECONDS
        for line in problems(job, self._selector, self._api):
            if line not in self._said:
                self._said.add(line)
                _say(line)


class _Chief:
    """The pods that were the chief one after the other, and what was printed of each."""

    def __init__(self, api: Api, selector: str):
        self._api, self._selector = api, selector
        self._printed: dict[str, int] = {}  # lines
        self._read: set[str] = set()
        self._reader: threading.Thread | None = None

    def look(self, is_last: bool) -> None:
        """Starts to print what is new, in a thread; `is_last` waits until all is printed."""
        if is_last and self._reader:
            self._reader.join()
        if self._reader and self._reader.is_alive():
            return
        pods = [
            (pod["metadata"]["name"], pod["status"]["phase"])
            for pod in self._api.pods(self._selector)
        ]
        unread = [pod for pod in pods if pod[1] != "Pending" and pod[0] not in self._read]
        if unread:
            self._reader = threading.Thread(target=self._print, args=[unread], daemon=True)
            self._reader.start()
        if is_last and self._reader:
            self._reader.join()

    def _print(self, pods: Sequence[tuple[str, str]]) -> None:
        for name, phase in pods:
            try:
                for number, line in enumerate(self._api.log_lines(name, follow="true")):
                    if number >= self._printed.get(name, 0):
                        self._printed[name] = number + 1
                        _print_line(line)
            except self._api.errors as error:
                if not self._api.is_outage(error):  # `wait` tells of an outage
                    _say(f"{name}: its log cannot be read: {explanation(error)}")
            if phase in ("Succeeded", "Failed"):
                self._read.add(name)

    def fetch_report(self, file: Path) -> None:
        """Writes the report that the last chief printed."""
        for pod in reversed(self._api.pods(self._selector)):
            name = pod["metadata"]["name"]
            lines = [*self._api.log_lines(name, tailLines=_REPORT_IS_IN_LAST_LINES)]
            for line in reversed(lines):
                if found := _REPORT.search(line):
                    file.write_text(json.dumps(json.loads(found[1]), indent=2) + "\n")
                    _say(f"report: {file}")
                    return
        _say("no report: the chief printed none (is its image an older one?)")


def status(name: str, api: Api) -> int:
    """Prints the state of the job and of its pods; returns 1 if there is none, else 0."""
    job = _find(name, api)
    if job is None:
        return 1
    print(f"{_title(job)}: {_state(job)}")
    selector = _KINDS[job["kind"]].pods.format(name)
    for pod in api.pods(selector):
        print(f"  {pod['metadata']['name']}: {_pod_state(pod)}")
    if not _is_suspended(job) and not _has_ended(job):
        for line in problems(job, selector, api):
            print(f"  {line}")
    return 0


def logs(name: str, api: Api, should_follow: bool) -> int:
    """Prints what the chief's pods printed, with `should_follow` until the job has ended."""
    job = _find(name, api)
    if job is None:
        return 1
    if should_follow:
        return wait(job, api, follow=True)
    for pod in api.pods(_KINDS[job["kind"]].chief.format(name)):
        if pod["status"]["phase"] != "Pending":
            for line in api.log_lines(pod["metadata"]["name"]):
                _print_line(line)
    return 0


def cancel(name: str, api: Api) -> int:
    """Deletes the job; its pods save their state first, and the volumes stay."""
    job = _find(name, api)
    if job is None:
        return 1
    if not _is_ours(job):
        _say(f"{_title(job)} is not of warmstate (its label {_OURS[0]} says so): left as it is")
        return 1
    api.delete(job)
    for kind, version in _OWNED.items():
        document: Document = {"apiVersion": version, "kind": kind, "metadata": {"name": name}}
        found = api.get(document)
        # With an owner it goes when the job has gone. Without one, kubectl made it.
        if found and _is_ours(found) and not found["metadata"].get("ownerReferences"):
            api.delete(document)
    print(f"{_title(job)}: deleted; its pods save their state and stop, its volumes stay")
    return 0


def _find(name: str, api: Api) -> Document | None:
    """Returns the job of that name, of whatever kind; says so if there is none."""
    refusals = []
    for kind, facts in _KINDS.items():
        document: Document = {
            "apiVersion": facts.api_version,
            "kind": kind,
            "metadata": {"name": name},
        }
        try:
            if found := api.get(document):
                return document | found
        except api.errors as error:
            # A user of one namespace gets 403, also for kinds that the cluster does not know.
            if getattr(error, "status", None) != 403:
                raise
            refusals.append(explanation(error))
    _say(f"the namespace {api.namespace} has no {', '.join(_KINDS)} named {name} that you may see")
    for refusal in refusals:
        _say(refusal)
    return None


def _is_ours(document: Document) -> bool:
    key, value = _OURS
    return bool(document["metadata"].get("labels", {}).get(key) == value)


def _title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def _conditions(job: Document) -> Mapping[str, Document]:
    """Returns the conditions that are true, by type."""
    conditions = job.get("status", {}).get("conditions", [])
    return {each["type"]: each for each in conditions if each["status"] == "True"}


def _has_ended(job: Document) -> bool:
    return bool({_KINDS[job["kind"]].succeeded, "Failed"} & _conditions(job).keys())


def _is_suspended(job: Document) -> bool:
    policy = job["spec"].get("runPolicy", job["spec"])  # of an MPIJob
    return bool(policy.get("suspend"))


def _state(job: Document) -> str:
    conditions = _conditions(job)
    if _KINDS[job["kind"]].succeeded in conditions:
        return "complete"
    if "Failed" in conditions:
        return f"failed: {conditions['Failed'].get('message', '')}"
    if job["metadata"].get("deletionTimestamp"):
        return "deleted; its pods save their state and stop"
    return "suspended, waits for its queue" if _is_suspended(job) else "has not ended"


def _pod_state(pod: Document) -> str:
    if line := lost_node(pod):
        return f"Terminating: {line}"
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    for container in pod["status"].get("containerStatuses", []):
        if ended := container["state"].get("terminated"):
            return f"{pod['status']['phase']}, exit code {ended['exitCode']}"
    phase: str = pod["status"]["phase"]
    reason = pending_reason(pod) if phase == "Pending" else ""
    return f"{phase}: {reason}" if reason else phase


def _print_line(line: str) -> None:
    if not _REPORT.search(line):
        print(line, end="" if line.endswith("\n") else "\n", flush=True)


def _say(line: str) -> None:
    print(f"launch: {line.rstrip()}", file=sys.stderr, flush=True)
