"""Starting, following and ending jobs, against a stand-in that answers as a real API server did."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.kubernetes import jobs
from launch.kubernetes.api import Api
from tests.launch.kubernetes.api_server import EDIT, ApiServer, Document, recorded, running

REPOSITORY = Path(__file__).parents[3]
TEAM = "/apis/batch/v1/namespaces/team/jobs"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/team/networkpolicies"
SERVICES = "/api/v1/namespaces/team/services"
CLAIMS = "/api/v1/namespaces/team/persistentvolumeclaims"
OURS = {"labels": {"app.kubernetes.io/name": "warmstate"}}
LOG = 'pretrain step 1/1\nreport.json: {"steps": 1}\n\nreport: runs/run/report.json\n'
PRINTED = "pretrain step 1/1\n\nreport: runs/run/report.json\n"
JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "warmstate"}}
# Path, condition, group, and label of the pods of each kind.
KINDS = {
    "Job": (TEAM, "Complete", "batch", "batch.kubernetes.io/job-name"),
    "JobSet": (
        "/apis/jobset.x-k8s.io/v1alpha2/namespaces/team/jobsets",
        "Completed",
        "jobset.x-k8s.io",
        "jobset.sigs.k8s.io/jobset-name",
    ),
    "MPIJob": (
        "/apis/kubeflow.org/v2beta1/namespaces/team/mpijobs",
        "Succeeded",
        "kubeflow.org",
        "training.kubeflow.org/job-name",
    ),
    "TrainJob": (
        "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs",
        "Complete",
        "trainer.kubeflow.org",
        "jobset.sigs.k8s.io/jobset-name",
    ),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    pytest.importorskip("kubernetes.config")
    config = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(config))
    # Which the client reads when it is imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.02)
    with running(config) as server:
        server.log = LOG
        yield server


def launch(*words: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    size = () if words and words[0] in ("status", "logs", "cancel") else ("--workers=2",)
    return subprocess.run(
        [sys.executable, "-m", "launch.main", "--platform=k8s", *size, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def condition(kind: str) -> Document:
    return {"conditions": [{"type": kind, "status": "True", "message": "code 2 met FailJob"}]}


def pod(name: str, label: str = KINDS["Job"][3], **status: Any) -> Document:
    """Returns a chief's pod of the job `warmstate` that has ended with code 2, or has `status`."""
    ended = {"exitCode": 2, "message": "error: --units=0 must be at least 1"}
    labels = {
        label: "warmstate",
        "batch.kubernetes.io/job-completion-index": "0",
        "training.kubeflow.org/job-role": "launcher",
    }
    usual = {"phase": "Failed", "containerStatuses": [{"state": {"terminated": ended}}]}
    return {
        "metadata": {"name": name, "labels": labels, "creationTimestamp": "2026-11-28T08:00:00Z"},
        "spec": {"nodeName": "node-7"},
        "status": status or usual,
    }


def add_job(server: ApiServer, status: Document, kind: str = "Job", **document: Any) -> str:
    path = f"{KINDS[kind][0]}/warmstate"
    server.groups.add(KINDS[kind][2])
    server.add(path, {"kind": kind, "metadata": OURS, "status": status} | document)
    return path


def ask(server: ApiServer, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{server.server_port}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, method=method)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


@pytest.mark.parametrize(
    ("name", "is_namespaced_user"),
    [
        ("create-job-conflict", False),
        ("delete-service-missing", False),
        ("get-group-absent-as-admin", False),
        ("get-job-missing-as-namespaced-user", True),
        ("get-jobset-as-namespaced-user-without-role", True),
        ("get-trainjob-group-absent-as-namespaced-user", True),
        ("get-node-as-namespaced-user", True),
    ],
)
def test_the_stand_in_answers_as_a_real_server_did(
    server: ApiServer, name: str, is_namespaced_user: bool
) -> None:
    real = recorded(name)
    server.roles = EDIT if is_namespaced_user else None
    server.add(f"{TEAM}/q", {})
    path = real["request"]["path"]
    if real["request"]["method"] == "POST":
        path += "?fieldValidation=Strict"
    answer = ask(server, real["request"]["method"], path, {"metadata": {"name": "q"}})
    assert answer == (real["status"], real["body"])


def test_a_job_is_created_with_strict_validation_and_followed(
    server: ApiServer, tmp_path: Path
) -> None:
    server.pods = [pod("warmstate-0-abcde", phase="Succeeded")]
    ended = threading.Event()

    def end_the_job() -> None:
        while f"{TEAM}/warmstate" not in server.objects:
            if ended.wait(0.01):
                return
        server.objects[f"{TEAM}/warmstate"]["status"] = condition("Complete")

    watcher = threading.Thread(target=end_the_job)
    watcher.start()
    try:
        done = launch("--follow", "--", "--stage=all", folder=tmp_path)
    finally:
        ended.set()
        watcher.join()
    assert (done.returncode, done.stderr.count("created")) == (0, 5), done.stderr
    assert done.stdout == PRINTED
    assert "launch: report: warmstate-report.json\n" in done.stderr
    assert json.loads((tmp_path / "warmstate-report.json").read_text()) == {"steps": 1}
    made = [path for method, path in server.requests if method == "POST"]
    assert made[-1].startswith(TEAM)  # what it refers to comes first
    assert all("fieldValidation=Strict" in path for path in made)
    # The job owns what exists for it alone, and not what holds data.
    (owner,) = server.objects[f"{SERVICES}/warmstate"]["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": "warmstate",
        "uid": "uid-of-warmstate",
    }
    assert server.objects[f"{POLICIES}/warmstate"]["metadata"]["ownerReferences"] == [owner]
    assert "ownerReferences" not in server.objects[f"{CLAIMS}/warmstate-runs"]["metadata"]


def test_a_failed_job_says_why(server: ApiServer, capsys: pytest.CaptureFixture) -> None:
    path = add_job(server, condition("Failed"))
    server.pods = [pod("warmstate-0-abcde")]
    assert (
        jobs.wait(server.objects[path] | {"kind": "Job", "apiVersion": "batch/v1"}, Api(""), False)
        == 1
    )
    said = capsys.readouterr().err
    assert "Job warmstate failed: code 2 met FailJob" in said
    assert "warmstate-0-abcde exited with code 2: error: --units=0" in said


def test_a_name_that_is_taken_changes_nothing(server: ApiServer) -> None:
    add_job(server, {})
    before = dict(server.objects)
    done = launch()
    assert done.returncode == 1
    assert "Job warmstate is there already: choose another --name" in done.stderr
    assert server.objects == before


def test_a_service_of_somebody_else_is_neither_used_nor_deleted(server: ApiServer) -> None:
    server.add(f"{SERVICES}/warmstate", {"spec": {"ports": [{"port": 80}]}})
    done = launch()
    assert done.returncode == 1
    assert "Service warmstate is there, and not of warmstate: choose another" in done.stderr
    assert set(server.objects) == {f"{SERVICES}/warmstate"}
    add_job(server, {})
    assert launch("cancel", "warmstate").returncode == 0
    assert f"{SERVICES}/warmstate" in server.objects
    assert "deletionTimestamp" not in server.objects[f"{SERVICES}/warmstate"]["metadata"]


def test_a_start_that_is_refused_leaves_nothing_behind(server: ApiServer) -> None:
    server.roles = EDIT | {"batch": set()}  # may create all but the job
    done = launch()
    assert done.returncode == 1
    assert 'cannot get resource "jobs" in API group "batch"' in done.stderr
    assert server.objects == {}
    # Refused only when it is created.
    server.roles = EDIT
    server.refusals = {"jobs": recorded("create-job-unknown-field")}
    done = launch()
    assert done.returncode == 1
    assert 'strict decoding error: unknown field "spec.completionz"' in done.stderr
    assert server.count("POST") > 1
    server.finish_deletions()
    assert server.objects == {}, done.stderr


def test_what_is_the_cluster_s_may_be_an_administrator_s(server: ApiServer) -> None:
    group = KINDS["TrainJob"][2]
    server.groups.add(group)
    server.roles = EDIT | {group: {"trainjobs"}}
    done = launch("--overlay=trainjob")
    assert done.returncode == 0, done.stderr
    assert "ClusterTrainingRuntime warmstate may not be seen; an administrator" in done.stderr
    assert f"{KINDS['TrainJob'][0]}/warmstate" in server.objects


@pytest.mark.parametrize("overlay", ["jobset", "mpijob", "trainjob"])
def test_custom_kinds_go_where_their_controllers_look(server: ApiServer, overlay: str) -> None:
    (kind,) = (kind for kind in KINDS if kind.lower() == overlay)
    server.groups.add(KINDS[kind][2])
    flags = ["--distributor=horovod"] * (overlay == "mpijob")
    done = launch(f"--overlay={overlay}", *flags)
    assert done.returncode == 0, done.stderr
    assert f"{KINDS[kind][0]}/warmstate" in server.objects
    if overlay == "trainjob":
        runtime = "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/warmstate"
        assert runtime in server.objects


@pytest.mark.parametrize("role", ["edit", "admin"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_found_whatever_its_kind(
    server: ApiServer, kind: str, role: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """With the rights of the role `edit`, and those that its kind's operator adds to it."""
    monkeypatch.chdir(tmp_path)
    _, succeeded, group, label = KINDS[kind]
    path = add_job(server, condition(succeeded), kind)
    server.pods = [pod("warmstate-0-abcde", label)]
    if role == "edit":
        server.roles = EDIT | {group: EDIT.get(group, set()) | {f"{kind.lower()}s"}}
        server.read_only = True  # as `view`, until something is cancelled
    api = Api("")
    assert jobs.status("warmstate", api) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{kind} warmstate: complete",
        "  warmstate-0-abcde: Failed, exit code 2",
    ]
    assert jobs.logs("warmstate", api, should_follow=False) == 0
    assert capsys.readouterr().out == PRINTED
    assert list(tmp_path.glob("*-report.json")) == []
    assert jobs.logs("warmstate", api, should_follow=True) == 0
    assert capsys.readouterr().out == PRINTED
    assert [file.name for file in tmp_path.glob("*-report.json")] == ["warmstate-report.json"]
    server.read_only = False
    assert jobs.cancel("warmstate", api) == 0
    # In the foreground: the name is free when no pod is left.
    assert (f"DELETE {path}?propagationPolicy=Foreground") in map(" ".join, server.requests)


def test_cancel_of_a_job_without_a_service_is_clean(server: ApiServer, capsys) -> None:
    path = add_job(server, {})  # as an elastic one
    server.roles = EDIT
    assert jobs.cancel("warmstate", Api("")) == 0
    out, said = capsys.readouterr()
    assert (out, said) == (
        "Job warmstate: deleted; its pods save their state and stop, its volumes stay\n",
        "",
    )
    assert "deletionTimestamp" in server.objects[path]["metadata"]
    assert jobs.status("warmstate", Api("")) == 0
    assert capsys.readouterr().out.startswith("Job warmstate: deleted; its pods save")


def test_cancel_takes_what_kubectl_made_along(server: ApiServer) -> None:
    add_job(server, {})
    server.add(f"{SERVICES}/warmstate", {"metadata": dict(OURS)})
    server.add(f"{POLICIES}/warmstate", {"metadata": dict(OURS)})
    server.add(f"{CLAIMS}/warmstate-runs", {"metadata": dict(OURS)})
    assert jobs.cancel("warmstate", Api("")) == 0
    server.finish_deletions()
    assert set(server.objects) == {f"{CLAIMS}/warmstate-runs"}


def test_cancel_leaves_a_job_that_is_not_ours(server: ApiServer, capsys) -> None:
    server.add(f"{TEAM}/payroll", {"metadata": {"labels": {"app.kubernetes.io/name": "payroll"}}})
    assert jobs.cancel("payroll", Api("")) == 1
    assert "Job payroll is not of warmstate" in capsys.readouterr().err
    assert server.count("DELETE") == 0


def test_a_job_that_is_not_there_names_what_may_not_be_seen(server: ApiServer, capsys) -> None:
    api = Api("other")
    for act in (jobs.status, jobs.cancel):
        assert act("nobody", api) == 1
    line = "launch: the namespace other has no TrainJob, JobSet, MPIJob, Job named nobody that "
    line += "you may see\n"
    assert capsys.readouterr() == ("", line * 2)
    server.roles = EDIT
    assert jobs.logs("nobody", api, should_follow=True) == 1
    first, *refusals = capsys.readouterr().err.splitlines()
    assert first == line.strip() and len(refusals) == 3
    assert all('is forbidden: User "dev" cannot get resource' in each for each in refusals)


def test_a_job_that_is_being_deleted_is_waited_for(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from launch.kubernetes.manifests import render
    from launch.kubernetes.options import KubernetesOptions

    path = add_job(server, {})
    api = Api("")
    assert jobs.cancel("warmstate", api) == 0
    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        assert server.count("POST") == 0  # no pod of the next job beside one of the last
        if len(looks) == 3:
            server.finish_deletions()

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    assert jobs.start(render(KubernetesOptions(workers=2)), api) == 0
    assert len(looks) == 3 and "deletionTimestamp" not in server.objects[path]["metadata"]
    assert "is being deleted; waiting until its pods have ended" in capsys.readouterr().err


def test_an_outage_of_the_api_server_does_not_end_the_waiting(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path = add_job(server, {"ready": 2}, spec={"parallelism": 2})
    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        server.away = 2 <= len(looks) < 6
        if len(looks) == 8:
            server.objects[path]["status"] = condition("Complete")

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    assert jobs.wait(JOB, Api(""), follow=False) == 0
    said = capsys.readouterr().err
    assert said.count("the API server is away") == 1 and said.count("the API server is back") == 1
    assert "Retrying" not in said
    server.away = True
    monkeypatch.setattr(jobs, "_OUTAGE_SECONDS", 0)
    assert jobs.wait(JOB, Api(""), follow=False) == jobs.UNREACHABLE_EXIT_CODE == 69
    assert "The job may still run" in capsys.readouterr().err
    done = launch("status", "warmstate")
    assert done.returncode == 69
    assert done.stderr.count("\n") == 1 and "the API server: " in done.stderr


@pytest.mark.parametrize(
    ("events", "pods", "says"),
    [
        (
            "events-quota",
            None,
            [
                "Job q: Error creating: a pod is forbidden: exceeded quota: small, ",
                "-> ask for fewer --workers, or for a larger quota",
                "claim warmstate-data: no persistent volumes available for this claim and no "
                "storage class is set -> set a default storage class, or --run_volume",
            ],
        ),
        (
            "events-limitrange",
            None,
            ["is forbidden: [maximum cpu usage per Container is 1", "LimitRange allows less"],
        ),
        (
            "events-pending",
            "pods-pending",
            ["q-0-gz4bv and 1 more cannot start: no nodes available to schedule pods -> "],
        ),
        ("events-quota", "pods-unschedulable", ["q-0-dpn5d cannot start: no nodes available"]),
    ],
)
def test_why_no_pod_runs(
    server: ApiServer, events: str, pods: str | None, says: list[str], capsys
) -> None:
    server.roles, server.read_only = EDIT, True
    real = recorded("job-quota")
    server.add(real["request"]["path"], real["body"])
    server.events = recorded(events)["body"]["items"]
    for event in server.events:  # recorded one after the other, of jobs of one name
        event["lastTimestamp"] = "2026-11-28T08:46:00Z"
    server.pods = recorded(pods)["body"]["items"] if pods else []
    assert jobs.status("q", Api("")) == 0
    printed = capsys.readouterr().out
    assert all(each in printed for each in says), printed
    # Many events of one reason are one line.
    lines = printed.splitlines()
    assert len(lines) == len(set(lines))


def test_a_namespace_that_forbids_the_pods_is_explained(server: ApiServer, capsys) -> None:
    add_job(server, {})
    message = recorded("create-pod-violating-restricted")["body"]["message"]
    job = {"kind": "Job", "name": "warmstate"}
    event = {"metadata": {}, "reason": "FailedCreate", "involvedObject": job}
    server.events = [event | {"message": f"Error creating: {message}"}]
    assert jobs.status("warmstate", Api("")) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "violates" in each]
    assert line.startswith("  Job warmstate: Error creating: a pod is forbidden: violates PodSecu")
    assert line.endswith("-> the namespace forbids it; the manifests as they are obey `restricted`")


@pytest.mark.parametrize(
    ("waiting", "says"),
    [
        ({"reason": "ContainerCreating"}, "Pending\n"),
        (
            {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"'},
            'ImagePullBackOff: Back-off pulling image "x" -> check --image',
        ),
        ({"reason": "InvalidImageName"}, "InvalidImageName -> check --image"),
    ],
)
def test_a_container_that_cannot_start(
    server: ApiServer, waiting: Document, says: str, capsys
) -> None:
    add_job(server, {})
    state = {"state": {"waiting": waiting}}
    server.pods = [pod("warmstate-0-abcde", phase="Pending", containerStatuses=[state])]
    assert jobs.status("warmstate", Api("")) == 0
    assert says in capsys.readouterr().out


def test_follow_says_each_reason_once_while_the_chief_runs(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = add_job(server, {"ready": 1}, spec={"parallelism": 2})
    pending = recorded("pods-pending")["body"]["items"][1]
    pending["metadata"]["labels"]["batch.kubernetes.io/job-name"] = "warmstate"
    server.pods = [pod("warmstate-0-abcde", phase="Running"), pending]
    monkeypatch.setattr(jobs, "_PROBLEMS_SECONDS", 0)
    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 5:
            server.objects[path]["status"] = condition("Complete")

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    assert jobs.wait(JOB, Api(""), follow=True) == 0
    out, said = capsys.readouterr()
    assert out == PRINTED
    assert said.count("q-1-rjbfn cannot start: no nodes available to schedule pods") == 1


@pytest.mark.parametrize("pending", [0, 1])
@pytest.mark.parametrize("workers", [2, 8, 64, 512])
def test_requests_of_follow_do_not_grow_with_the_workers(
    server: ApiServer, workers: int, pending: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The figures of k8s/README.md: one request in two seconds, and three more in ten."""
    monkeypatch.chdir(tmp_path)
    path = add_job(server, {"ready": workers - pending}, spec={"parallelism": workers})
    server.pods = [pod(f"warmstate-{index}-abcde", phase="Running") for index in range(workers)]
    server.log_is_open = True  # the chief runs on
    clock = [1000.0]
    before: list[int] = []

    def pause(seconds: float) -> None:
        clock[0] += 2.0
        if clock[0] == 1010:
            assert server.log_was_asked.wait(60)  # by another thread, which the clock does not hold
            before.append(len(server.requests))
        if clock[0] == 1070:
            before.append(len(server.requests))
            server.objects[path]["status"] = condition("Complete")
            server.log_is_open = False

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=pause, monotonic=lambda: clock[0]))
    assert jobs.wait(JOB, Api(""), follow=True) == 0
    assert before[1] - before[0] == 30 + pending * 6 * 3


def test_a_pod_on_a_lost_node_says_what_to_do(server: ApiServer, capsys) -> None:
    add_job(server, {"terminating": 1})
    lost = pod("warmstate-1-abcde", phase="Running")
    ended = datetime.now(UTC) - timedelta(seconds=60)
    lost["metadata"]["deletionTimestamp"] = ended.strftime("%Y-%m-%dT%H:%M:%SZ")
    leaving = pod("warmstate-2-abcde", phase="Running")
    leaving["metadata"]["deletionTimestamp"] = "2099-01-01T00:00:00Z"
    server.pods = [lost, leaving]
    assert jobs.status("warmstate", Api("")) == 0
    printed = capsys.readouterr().out
    assert "kubectl taint node node-7 node.kubernetes.io/out-of-service=nodeshutdown" in printed
    assert "  warmstate-2-abcde: Terminating\n" in printed


def test_a_log_that_cannot_be_read_does_not_end_the_waiting(server: ApiServer, capsys) -> None:
    add_job(server, condition("Failed"))
    server.pods = [pod("warmstate-0-abcde")]
    server.roles = EDIT | {"": EDIT[""] - {"pods/log"}}
    assert jobs.logs("warmstate", Api(""), should_follow=True) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "warmstate-0-abcde: its log cannot be read: " in printed.err
    assert "Job warmstate failed: code 2 met FailJob" in printed.err


def test_what_the_server_refuses_is_one_line(server: ApiServer) -> None:
    add_job(server, {})
    server.roles = {"batch": {"jobs"}}
    done = launch("status", "warmstate")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        'launch: --platform=k8s: the API server: pods "None" is forbidden'
    )


@pytest.mark.parametrize(
    ("content", "says"), [(None, "there is no kubeconfig "), ("{}", "names no")]
)
def test_no_cluster_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, says: str
) -> None:
    pytest.importorskip("kubernetes")
    if content:
        (tmp_path / "config").write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    done = launch("status", "warmstate")
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.startswith("launch: --platform=k8s: ")
    assert done.stderr.count("\n") == 1
