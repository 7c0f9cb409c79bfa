"""The rendered Indexed Job trains in two pods, whatever happens to them; see pod_runner.py."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.kubernetes import manifests as kubernetes
from launch.kubernetes.options import KubernetesOptions
from tests.integration import operators, pod_runner
from tests.integration.programs import ENVIRONMENT, REPOSITORY, SMALL, metrics, train
from tests.s3_server import needs_s3, s3_server
from trainer.distribution import cluster

FLAGS = ("--stage=pretrain", "--pretrain_steps=24")


@contextmanager
def job(
    folder: Path, store: Path, *flags: str, **options: object
) -> Iterator[pod_runner.IndexedJob]:
    """Runs what the launcher renders for two workers, on empty volumes and a copy of the store."""
    claims = {"warmstate-runs": folder / "runs", "warmstate-data": folder / "data"}
    claims["warmstate-runs"].mkdir(parents=True)
    shutil.copytree(store, claims["warmstate-data"] / "store")
    trainer_flags = [*SMALL, "--store=/data/store", "--run_dir=runs/run", *flags]
    documents = kubernetes.render(KubernetesOptions(workers=2, **options), trainer_flags)
    with pod_runner.indexed_job(documents, claims, folder / "pods") as running:
        yield running


def encoder(folder: Path) -> bytes:
    return (folder / "encoder" / "encoder.safetensors").read_bytes()


@pytest.mark.slow("pods that train; quick: one that fails, and what a controller sets")
def test_two_pods_train_lose_one_and_end_with_the_same_bits(
    small_store: Path, tmp_path: Path
) -> None:
    train(2, *FLAGS, f"--store={small_store}", f"--run_dir={tmp_path}/two")
    with job(tmp_path / "job", small_store, *FLAGS) as running:
        running.wait_for_line(r"pretrain step 12/")
        deleted = running.running(1)
        running.delete(deleted)
        condition = running.wait()
    assert condition[0] == "Complete", running.log()
    # Both stopped at one step, before the grace period's end, and neither counts as a failure; two
    # more pods finished.
    assert [pod.exit_code for pod in running.pods[:2]] == [143, 143]
    assert len(running.pods) == 4 and running.counted == 0
    assert running.pauses == [10, 10]
    assert any("resumed after step" in line for pod in running.pods[2:] for line in pod.lines)
    run = tmp_path / "job" / "runs" / "run"
    printed = [line for pod in running.pods for line in pod.lines if line[:13] == "report.json: "]
    assert [json.loads(line[13:]) for line in printed] == [
        json.loads((run / "report.json").read_text())
    ]
    assert metrics(run) == metrics(tmp_path / "two")
    assert encoder(run) == encoder(tmp_path / "two")


@pytest.mark.slow("pods that train; quick: one that fails, and what a controller sets")
def test_a_killed_pod_costs_one_restart(small_store: Path, tmp_path: Path) -> None:
    with job(tmp_path, small_store, *FLAGS, max_restarts=1) as running:
        running.wait_for_line(r"pretrain step 12/")
        victim = running.running(1)
        victim.process.kill()  # as for lack of memory
        condition = running.wait()
    assert condition[0] == "Complete", running.log()
    assert victim.exit_code == 137
    assert running.pods[0].exit_code == 75, running.log()  # it lost a peer
    assert len(running.pods) == 4 and running.counted == 2


@needs_s3
@pytest.mark.slow("pods that train; quick: one that fails, and what a controller sets")
def test_two_pods_without_a_shared_volume_lose_one_and_end_with_the_same_bits(
    small_store: Path, tmp_path: Path
) -> None:
    train(2, *FLAGS, f"--store={small_store}", f"--run_dir={tmp_path}/two")
    urls = ("--mirror=s3://bucket/run", "--store=s3://bucket/store", "--run_dir=runs/run")
    documents = kubernetes.render(
        KubernetesOptions(workers=2, overlay="object-store"), [*SMALL, *FLAGS, *urls]
    )
    assert not any(document["kind"] == "PersistentVolumeClaim" for document in documents)
    by_kind = {document["kind"]: document for document in documents}
    with pod_runner.kubelet({}, tmp_path / "pods", by_kind["Service"]) as node:
        namespace, address = node.add_network()
        inside = ["ip", "netns", "exec", namespace]
        with s3_server(address, inside) as server:
            put_store = f"""
from pathlib import Path
from data_pipelines.object_store import ObjectStore
for path in Path({str(small_store)!r}).iterdir():
    ObjectStore("s3://bucket/store").upload(path, path.name)
"""
            environment = ENVIRONMENT | server.environment
            command = [*inside, sys.executable, "-c", put_store]
            subprocess.run(command, check=True, env=environment, cwd=REPOSITORY)
            (container,) = by_kind["Job"]["spec"]["template"]["spec"]["containers"]
            # In place of the secret, and of the driver in the image.
            variables = server.environment | {"PYTHONPATH": "/app:/opt/s3"}
            container["env"] += [{"name": n, "value": v} for n, v in variables.items()]
            running = pod_runner.IndexedJob(by_kind["Job"], node)
            running.start()
            running.wait_for_line(r"pretrain step 14/")
            running.running(1).process.kill()  # its peer loses it, and its folder with its pod
            assert running.wait()[0] == "Complete", running.log()
    printed = running.log()
    assert len(running.pods) == 4 and printed.count("mirror: fetched") == 1, printed
    assert "pretrain: resumed after step" in printed
    (last,) = (pod for pod in running.pods[2:] if pod.index == 0)
    run = last.hosts.parent / "runs" / "run"
    assert metrics(run) == metrics(tmp_path / "two")
    assert encoder(run) == encoder(tmp_path / "two")


@pytest.mark.slow("pods that train; quick: one that fails, and what a controller sets")
@pytest.mark.horovod
def test_an_elastic_pod_shrinks_is_deleted_and_finishes(small_store: Path, tmp_path: Path) -> None:
    elastic = {"elastic": True, "min_workers": 1, "max_workers": 2, "name": "el"}
    steps = 300  # the launcher looks at the file twice a second
    with job(tmp_path, small_store, *FLAGS, f"--pretrain_steps={steps}", **elastic) as running:
        running.wait_for_line(r"pretrain step 6/")
        (tmp_path / "runs" / "el.workers").write_text("1")
        running.wait_for_line("resumed after step")
        deleted = running.running(0)
        running.delete(deleted)
        condition = running.wait()
    assert condition[0] == "Complete", running.log()
    assert deleted.exit_code == 143 and running.counted == 0
    first, second = running.pods
    changed = "launch: runs/el.workers allows 1 instead of 2 workers: resuming from the last"
    assert any(line.startswith(changed) for line in first.lines)
    assert any("resumed after step" in line for line in second.lines)
    lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    done = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert done == list(range(1, steps + 1))  # each once, over three sittings


def test_a_wrong_flag_fails_the_job_at_once(small_store: Path, tmp_path: Path) -> None:
    with job(tmp_path, small_store, "--pretrain_steps=many") as running:
        condition = running.wait()
    assert condition == ("Failed", "PodFailurePolicy")
    assert len(running.pods) == 2  # none was made again
    failed = [pod for pod in running.pods if pod.exit_code == 2]
    assert failed
    for pod in failed:
        assert "error: " in pod.termination_message
        assert "--pretrain_steps=many" in pod.termination_message


def test_an_index_that_fails_too_often_fails_the_job(tmp_path: Path, small_store: Path) -> None:
    flags = ("--stage=finetune", "--encoder=/data/none")  # as of an error that no retry mends
    with job(tmp_path, small_store, *flags, max_restarts=0) as running:
        for pod in running.pods:
            pod.process.kill()
        condition = running.wait()
    assert condition == ("Failed", "MaxFailedIndexesExceeded")
    assert len(running.pods) == 2


@pytest.mark.parametrize(
    ("spec", "workers", "measured"),
    [
        ({"backoffLimit": 6}, 2, (20, 80, 320)),
        ({"backoffLimit": 12}, 4, (81,)),
        ({"backoffLimit": 24}, 8, (603,)),
        ({"backoffLimitPerIndex": 3, "maxFailedIndexes": 0}, 8, (12,)),
    ],
)
def test_the_pauses_are_those_that_were_measured(
    spec: dict[str, int], workers: int, measured: tuple[float, ...]
) -> None:
    """On a real control plane (v1.36): seconds until the pods were back after all were deleted."""
    for disruption, seconds in enumerate(measured, start=1):
        pause = pod_runner.backoff_seconds(spec, disruption, disruption * workers)
        assert 0 <= seconds - pause <= 3


@pytest.mark.parametrize("overlay", ["indexed-job", "jobset", "gpu-nodes", "trainjob"])
def test_failures_are_counted_per_index(overlay: str) -> None:
    text = json.dumps(kubernetes.render(KubernetesOptions(workers=2, overlay=overlay)))
    assert '"backoffLimitPerIndex": 3' in text and '"backoffLimit"' not in text


def on_paper(workers: int) -> tuple[pod_runner.IndexedJob, pod_runner.PaperKubelet]:
    documents = kubernetes.render(KubernetesOptions(workers=workers))
    kubelet = pod_runner.PaperKubelet()
    job = pod_runner.IndexedJob(next(d for d in documents if d["kind"] == "Job"), kubelet)
    job.start()
    assert len(job.pods) == workers
    return job, kubelet


@pytest.mark.parametrize("workers", [2, 8, 64, 512])
def test_a_disruption_costs_hundreds_of_workers_what_it_costs_two(workers: int) -> None:
    job, kubelet = on_paper(workers)
    for disruption in range(1, 4):
        first, *peers = job.pods[-workers:]
        kubelet.delete(first, disruption=True)
        for peer in peers:
            kubelet.end(peer, 143)  # they save and stop with it
        job.wait_until(kubelet.events.empty)
        assert len(job.pods) == (disruption + 1) * workers
        assert job.pauses[-workers:] == [10 * 2 ** (disruption - 1)] * workers
    assert job.counted == 0
    kubelet.end(job.running(0), 0)
    assert job.wait() == ("Complete", "SuccessPolicy")
    assert all(pod.exit_code is not None for pod in job.pods)


@pytest.mark.parametrize("workers", [2, 8, 64, 512])
def test_three_crashes_of_any_workers_are_survived_and_not_the_fourth(workers: int) -> None:
    job, kubelet = on_paper(workers)
    for crash in range(4):
        assert job.condition is None and len(job.pods) == (crash + 1) * workers
        running = job.pods[-workers:]
        victim = running[crash % workers]
        kubelet.end(victim, 137)
        for peer in running:
            if peer is not victim:
                kubelet.end(peer, 75)  # a failure of theirs too
        job.wait_until(kubelet.events.empty)
    assert job.condition == ("Failed", "MaxFailedIndexesExceeded")


def test_a_wrong_flag_of_one_of_512_pods_ends_all(tmp_path: Path) -> None:
    job, kubelet = on_paper(512)
    kubelet.end(job.running(300), 2)
    assert job.wait() == ("Failed", "PodFailurePolicy")
    assert len(job.pods) == 512 and all(pod.deleted for pod in job.pods if pod.index != 300)


def readme_table(name: str) -> list[list[str]]:
    """Returns the cells of the rows of a table in k8s/README.md, without the first column."""
    text = (REPOSITORY / "k8s" / "README.md").read_text().partition(f"<!-- {name} -->\n")[2]
    rows = text.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows]


def test_the_pauses_in_the_readme() -> None:
    ours, before = readme_table("pauses")
    for spec, row in (({"backoffLimitPerIndex": 3}, ours), ({"backoffLimit": 6}, before)):
        for workers, cell in zip((2, 8, 64, 512), row, strict=True):
            pauses = (pod_runner.backoff_seconds(spec, n, n * workers) for n in (1, 2, 3))
            assert cell == ", ".join(f"{pause:.0f}" for pause in pauses)


def kilobytes(document: object) -> str:
    return f"{len(json.dumps(document)) / 1000:.1f} kB"


def test_the_sizes_in_the_readme() -> None:
    sizes, customs, configs, hosts, slices, *requests, creation, again = readme_table("sizes")
    # As test_requests_of_follow_do_not_grow_with_the_workers counts them.
    assert requests == [["30"] * 4, ["48"] * 4]
    for column, workers in enumerate((2, 8, 64, 512)):
        documents = kubernetes.render(KubernetesOptions(workers=workers))
        (job,) = (each for each in documents if each["kind"] == "Job")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        (value,) = (e["value"] for e in container["env"] if e["name"] == "WARMSTATE_HOSTS")
        value = value.replace("$(WARMSTATE_JOB)", "warmstate")
        value = value.replace("$(WARMSTATE_SERVICE)", "warmstate")
        assert sizes[column] == kilobytes(job)
        assert hosts[column] == str(len(value))
        assert len(cluster.expand_hosts(value, "WARMSTATE_HOSTS")) == workers
        customs_of = {
            each["kind"]: each
            for overlay in ("gpu-nodes", "mpijob", "trainjob")
            for each in kubernetes.render(KubernetesOptions(workers=workers, overlay=overlay))
            if each["kind"] in ("JobSet", "MPIJob", "TrainJob", "ClusterTrainingRuntime")
        }
        largest = max(customs_of, key=lambda kind: len(json.dumps(customs_of[kind])))
        assert largest == "JobSet" and customs[column] == kilobytes(customs_of[largest])
        _, data = operators.objects_of_mpi_job(customs_of["MPIJob"])
        assert configs[column] == kilobytes(data)
        assert slices[column] == str(math.ceil(workers / 100))
        assert creation[column] == str(math.ceil(workers / 20))
        assert again[column] == str(10 + math.ceil(workers / 20))


def test_a_queued_job_has_no_pods_until_it_is_resumed(small_store: Path, tmp_path: Path) -> None:
    with job(tmp_path, small_store, "--units=0", queue="team") as running:
        assert running.pods == []
        running.resume()
        assert running.wait() == ("Failed", "PodFailurePolicy")


def test_environment_as_the_job_controller_and_the_kubelet_make_it() -> None:
    documents = kubernetes.render(KubernetesOptions(name="a-job", workers=12))
    (manifest,) = (document for document in documents if document["kind"] == "Job")
    pod = pod_runner.pod_manifest(manifest, 11, "abcde")
    environment = pod_runner.container_environment(pod, pod_runner.IMAGE_ENVIRONMENT)
    assert list(environment)[-1] == "JOB_COMPLETION_INDEX"
    assert environment["JOB_COMPLETION_INDEX"] == "11"
    assert environment["WARMSTATE_HOSTS"] == "a-job-[0-11].a-job"
    assert environment["OMP_NUM_THREADS"] == "2"
    place = cluster.resolve(environment)
    assert (place.rank, place.size) == (11, 12)
    assert place.addresses[11] == "a-job-11.a-job:20000"
    assert re.fullmatch(r"a-job-11-\w{5}", pod["metadata"]["name"])
