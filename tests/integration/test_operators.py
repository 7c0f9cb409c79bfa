"""Our manifests under JobSet, Trainer, the MPI operator and Kueue: a replay, see operators.py."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.kubernetes import jobs
from launch.kubernetes import manifests as kubernetes
from launch.kubernetes.options import KubernetesOptions
from tests.integration import operators, pod_runner
from tests.integration.operators import Document, MpiJob
from tests.integration.pod_runner import IndexedJob, PaperKubelet
from tests.integration.programs import SMALL, metrics, train
from trainer.distribution import cluster

FLAGS = ("--stage=pretrain", "--pretrain_steps=24")


def rendered(overlay: str, *flags: str, **options: Any) -> dict[str, Document]:
    """Returns what the launcher renders, by kind."""
    if overlay == "mpijob":
        options["distributor"] = "horovod"
    given = KubernetesOptions(overlay=overlay, **{"workers": 2, **options})
    return {each["kind"]: each for each in kubernetes.render(given, flags)}


def job_and_service(overlay: str, documents: dict[str, Document]) -> tuple[Document, Document]:
    """Returns the Job and the Service at the end of the chain of controllers."""
    if overlay == "indexed-job":
        return documents["Job"], documents["Service"]
    job_set = documents.get("JobSet") or operators.job_set_of_train_job(
        documents["TrainJob"], documents["ClusterTrainingRuntime"]
    )
    return operators.job_of_job_set(job_set)


def controller(
    overlay: str, documents: dict[str, Document], kubelet: pod_runner.Kubelet
) -> MpiJob | IndexedJob:
    if overlay == "mpijob":
        return MpiJob(documents["MPIJob"], kubelet)
    return IndexedJob(job_and_service(overlay, documents)[0], kubelet)


def matches(selector: str, labels: dict[str, str]) -> bool:
    return dict(pair.split("=") for pair in selector.split(",")).items() <= labels.items()


@pytest.mark.parametrize("overlay", ["indexed-job", "jobset", "gpu-nodes", "trainjob"])
@pytest.mark.parametrize("workers", [2, 8, 64, 512])
def test_every_pod_finds_all_others(overlay: str, workers: int) -> None:
    """By the names that the controllers give, behind the network policy, up to 512 workers."""
    documents = rendered(overlay, workers=workers, name="reviews")
    job, service = job_and_service(overlay, documents)
    kind = next(kind for kind in jobs._KINDS if kind in documents)
    facts = jobs._KINDS[kind]
    policy = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    hosts = []
    for index in range(workers):
        pod = pod_runner.pod_manifest(job, index, "abcde")
        hosts.append(f"{pod['spec']['hostname']}.{pod['spec']['subdomain']}")
        labels = pod["metadata"]["labels"]
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["publishNotReadyAddresses"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert policy.items() <= labels.items()
        assert matches(facts.pods.format("reviews"), labels)
        assert matches(facts.chief.format("reviews"), labels) == (index == 0)
    for index in {0, workers // 2, workers - 1}:
        pod = pod_runner.pod_manifest(job, index, "abcde")
        found = cluster.resolve(pod_runner.container_environment(pod, {}))
        assert (found.rank, found.size) == (index, workers)
        assert list(found.addresses) == [f"{host}:20000" for host in hosts]
        assert all(len(label) <= 63 for host in hosts for label in host.split("."))


def test_a_train_job_changes_its_runtime_only_where_it_says_so() -> None:
    options = {"gpus_per_worker": 2, "node_selector": "disk=fast", "run_volume": "my-runs"}
    documents = rendered("trainjob", "--stage=pretrain", image="x:7", **options)
    (node,) = operators.job_set_of_train_job(
        documents["TrainJob"], documents["ClusterTrainingRuntime"]
    )["spec"]["replicatedJobs"]
    job = rendered("indexed-job", "--stage=pretrain", image="x:7", **options)["Job"]["spec"]
    made = node["template"]["spec"]
    # The same Job as without operators, apart from names that Trainer knows.
    text = json.dumps(made).replace('"name": "node"', '"name": "trainer"')
    made = json.loads(text.replace('"containerName": "node"', '"containerName": "trainer"'))
    pods = made["template"]["spec"], job["template"]["spec"]
    volumes = [{each["name"]: each for each in pod.pop("volumes")} for pod in pods]
    assert volumes[0] == volumes[1]
    assert pods[1].pop("subdomain") == "warmstate" and pods[0] == pods[1]
    for spec in (made, job):
        del spec["template"], spec["suspend"]
    assert made == job


@pytest.mark.parametrize("overlay", ["indexed-job", "jobset", "trainjob", "mpijob"])
def test_kueue_decides_when_and_where_a_queued_job_starts(overlay: str) -> None:
    documents = rendered(overlay, queue="team", node_selector="disk=fast")
    job = documents[next(kind for kind in jobs._KINDS if kind in documents)]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    kubelet = PaperKubelet()
    waiting = controller(overlay, documents, kubelet)
    waiting.start()
    assert waiting.condition is None and kubelet.pods == []
    operators.admit(job, {"pool": "a", "kubernetes.io/os": "linux"})
    running = controller(overlay, documents, kubelet)
    running.start()
    count = 3 if overlay == "mpijob" else 2
    assert len(kubelet.pods) == count
    for pod in kubelet.pods:
        assert pod.spec["nodeSelector"].items() >= {"disk": "fast", "pool": "a"}.items()
    # Preempted, and admitted again: that is no failure of the job.
    running.suspend()
    running.wait_until(kubelet.events.empty)
    assert all(pod.exit_code == 143 for pod in kubelet.pods) and running.condition is None
    running.resume()
    again = kubelet.pods[count:]
    assert len(again) == count
    kubelet.end(next(pod for pod in again if "-worker-" not in pod.name), 0)
    assert running.wait()[0] == "Complete"


@pytest.mark.parametrize("overlay", ["indexed-job", "jobset", "mpijob"])
def test_kueue_does_not_send_a_job_to_nodes_that_it_excludes(overlay: str) -> None:
    documents = rendered(overlay, queue="team", node_selector="disk=fast")
    job = documents[next(kind for kind in jobs._KINDS if kind in documents)]
    with pytest.raises(ValueError, match="conflict for disk: fast and slow"):
        operators.admit(job, {"disk": "slow"})


def test_mpi_workers_are_made_again_and_the_launcher_is_counted() -> None:
    """As in the operator's own tests: suspended start, failure, clean-up of running workers."""
    kubelet = PaperKubelet()
    job = MpiJob(rendered("mpijob", max_restarts=1)["MPIJob"], kubelet)
    job.start()
    names = ["warmstate-worker-0", "warmstate-worker-1", "warmstate-launcher-00000"]
    assert [pod.name for pod in kubelet.pods] == names
    lost = job.workers[1]
    job.delete(lost)
    job.wait_until(kubelet.events.empty)
    assert job.workers[1] is not lost and job.workers[1].name == names[1]
    kubelet.end(job.launcher.running(0), 1)
    job.wait_until(kubelet.events.empty)
    assert job.condition is None and job.launcher.pauses == [10]
    kubelet.end(job.launcher.running(0), 1)
    assert job.wait() == ("Failed", "BackoffLimitExceeded")
    assert [pod.exit_code for pod in job.workers.values()] == [143, 143]


@pytest.mark.parametrize("workers", [2, 512])
def test_what_the_mpi_operator_makes_fits_us(workers: int) -> None:
    documents = rendered("mpijob", workers=workers, name="reviews")
    kubelet = PaperKubelet()
    job = MpiJob(documents["MPIJob"], kubelet)
    job.start()
    service, data = operators.objects_of_mpi_job(documents["MPIJob"])
    policy = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    facts = jobs._KINDS["MPIJob"]
    for pod in kubelet.pods:
        labels = pod.manifest["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert policy.items() <= labels.items()
        assert matches(facts.pods.format("reviews"), labels)
        assert matches(facts.chief.format("reviews"), labels) == (pod in job.launcher.pods)
    hosts = [f"{pod.spec['hostname']}.{pod.spec['subdomain']}" for pod in job.workers.values()]
    lines = data["hostfile"].splitlines()
    assert lines == [f"{host}.{pod_runner.NAMESPACE}.svc slots=1" for host in hosts]
    (launcher,) = job.launcher.pods
    command = launcher.spec["containers"][0]["command"]
    assert command[command.index("-np") + 1] == str(workers)
    assert command[command.index("--hostfile") + 1] == "/etc/mpi/hostfile"
    assert sum(map(len, data.values())) < 100_000  # a ConfigMap may have 1 MiB


@contextmanager
def pods(folder: Path, store: Path, claims: dict[str, Path], service: Document) -> Iterator[Any]:
    """Yields a kubelet with the two volumes, a copy of the store among them."""
    claims |= {"warmstate-runs": folder / "runs", "warmstate-data": folder / "data"}
    claims["warmstate-runs"].mkdir(parents=True)
    shutil.copytree(store, claims["warmstate-data"] / "store")
    with pod_runner.kubelet(claims, folder / "pods", service) as kubelet:
        yield kubelet


@pytest.mark.timeout(1200)
@pytest.mark.slow("an MPIJob that trains over ssh; quick: the same steps on paper")
@pytest.mark.horovod
def test_an_mpi_job_is_drained_killed_and_preempted_and_finishes(
    small_store: Path, tmp_path: Path
) -> None:
    if shutil.which("sshd", path="/usr/sbin") is None:
        pytest.skip("needs sshd (Debian: openssh-server)")
    flags = [*SMALL, *FLAGS, "--pretrain_steps=200", "--store=/data/store", "--run_dir=runs/run"]
    mpi_job = rendered("mpijob", *flags)["MPIJob"]
    claims = operators.write_mpi_objects(mpi_job, tmp_path / "objects")
    service, _ = operators.objects_of_mpi_job(mpi_job)
    a_step = r"pretrain step \d+/"
    with pods(tmp_path, small_store, claims, service) as kubelet:
        job = MpiJob(mpi_job, kubelet)
        job.start()
        job.wait_for_line(a_step)
        drained = job.workers[1]
        job.delete(drained, disruption=True)
        job.wait_for_line("resumed after step")
        job.wait_for_line(a_step)
        job.suspend()
        job.wait_until(lambda: all(pod.exit_code is not None for pod in kubelet.pods))
        assert len(kubelet.pods) == 5
        job.resume()
        job.wait_for_line("resumed after step")
        job.wait_for_line(a_step)
        job.delete(job.launcher.running(0), disruption=True)
        job.wait_for_line("resumed after step")
        job.wait_for_line(a_step)
        killed = job.workers[0]
        killed.process.kill()  # as for lack of memory
        condition = job.wait()
    log = job.log()
    assert condition[0] == "Complete", log
    # The preemption is not counted. What else ends a trainer costs the launcher's Job one failure.
    assert job.launcher.pauses == [10, 20, 40] and job.launcher.counted == 3, log
    assert job.workers[1] is not drained and killed.restarts == 1
    stopped = [int(step) for step in re.findall(r"\[0\].*stopped by TERM after step (\d+)", log)]
    resumed = [int(step) for step in re.findall(r"resumed after step (\d+)", log)]
    assert resumed[:3] == stopped and len(resumed) == 4, log
    lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    done = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert done == list(range(1, 201))


@pytest.mark.slow("pods that train; quick: the same steps on paper")
def test_a_train_job_that_kueue_preempts_ends_with_the_same_bits(
    small_store: Path, tmp_path: Path
) -> None:
    train(2, *FLAGS, f"--store={small_store}", f"--run_dir={tmp_path}/two")
    flags = [*SMALL, *FLAGS, "--store=/data/store", "--run_dir=runs/run"]
    documents = rendered("trainjob", *flags, queue="team")
    operators.admit(documents["TrainJob"], {"pool": "a"})
    job_manifest, service = job_and_service("trainjob", documents)
    with pods(tmp_path, small_store, {}, service) as kubelet:
        job = IndexedJob(job_manifest, kubelet)
        job.start()
        job.wait_for_line(r"pretrain step 12/")
        job.suspend()
        job.wait_until(lambda: all(pod.exit_code is not None for pod in kubelet.pods))
        assert [pod.exit_code for pod in kubelet.pods] == [143, 143], job.log()
        job.resume()
        condition = job.wait()
    assert condition == ("Complete", "SuccessPolicy") and job.counted == 0, job.log()
    assert "resumed after step" in job.log()
    run = tmp_path / "runs" / "run"
    assert metrics(run) == metrics(tmp_path / "two")
    encoders = [each / "encoder" / "encoder.safetensors" for each in (run, tmp_path / "two")]
    assert encoders[0].read_bytes() == encoders[1].read_bytes()
