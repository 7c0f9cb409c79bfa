"""The cases of test_kubernetes.py through a real API server and Job controller: `make test-k8s`.

Needs KUBECONFIG, and WARMSTATE_K8S_IMAGE: an image of k8s/Dockerfile that the cluster can run.
WARMSTATE_K8S_ACCESS_MODE is the claims', ReadWriteOnce unless it says ReadWriteMany.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.programs import REPOSITORY, SMALL

IMAGE = os.environ.get("WARMSTATE_K8S_IMAGE", "")
pytestmark = [
    pytest.mark.slow("needs a cluster: make test-k8s"),
    pytest.mark.skipif(
        not (IMAGE and os.environ.get("KUBECONFIG")),
        reason="needs a cluster: KUBECONFIG and WARMSTATE_K8S_IMAGE",
    ),
]
FLAGS = (
    "--stage=pretrain",
    "--pretrain_steps=200",
    "--source=movie_reviews",
    "--store=/data/store",
)


@pytest.fixture(scope="module")
def core() -> Any:
    """Returns the client of the core API."""
    from kubernetes import client, config

    config.load_kube_config()
    return client.CoreV1Api()


@pytest.fixture(scope="module")
def namespace(core: Any) -> Iterator[str]:
    """Yields a namespace that enforces `restricted`, with the two claims."""
    name = f"warmstate-test-{os.getpid()}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core.create_namespace({"metadata": {"name": name, "labels": labels}})
    try:
        mode = os.environ.get("WARMSTATE_K8S_ACCESS_MODE", "ReadWriteOnce")
        for claim in ("runs", "data"):
            spec = {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}}
            core.create_namespaced_persistent_volume_claim(
                name, {"metadata": {"name": claim}, "spec": spec}
            )
        yield name
    finally:
        core.delete_namespace(name)


def start(namespace: str, name: str, *flags: str) -> subprocess.Popen[str]:
    """Starts the launcher, which follows the job."""
    launcher = ["--platform=k8s", "--workers=2", f"--namespace={namespace}", f"--name={name}"]
    launcher += [f"--image={IMAGE}", "--run_volume=runs", "--data_volume=data", "--follow"]
    return subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-m",
            "launch.main",
            *launcher,
            "--",
            *SMALL,
            *FLAGS,
            f"--run_dir=runs/{name}",
            *flags,
        ],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def result(printed: str) -> list[str]:
    """Returns the figures of the result that the chief prints, digit by digit."""
    return re.findall(r'"(?:steps|nats_per_token|perplexity)": \S+', printed)


def pods(core: Any, namespace: str, name: str, index: int) -> list[Any]:
    selector = f"batch.kubernetes.io/job-name={name}"
    selector += f",batch.kubernetes.io/job-completion-index={index}"
    return core.list_namespaced_pod(namespace, label_selector=selector).items


def test_a_deleted_pod_changes_no_bit(core: Any, namespace: str) -> None:
    whole, _ = start(namespace, "whole").communicate(timeout=1800)
    assert len(result(whole)) == 3, whole
    disturbed = start(namespace, "disturbed")
    try:
        for line in disturbed.stdout:
            if "pretrain step 50/" in line:
                break
        (pod,) = pods(core, namespace, "disturbed", 1)
        core.delete_namespaced_pod(pod.metadata.name, namespace)
        rest, _ = disturbed.communicate(timeout=1800)
    finally:
        disturbed.kill()
        disturbed.wait()
    assert disturbed.returncode == 0, rest
    assert "resumed after step" in rest
    assert result(rest) == result(whole)


def test_a_wrong_flag_fails_the_job_at_once(core: Any, namespace: str) -> None:
    began = time.monotonic()
    process = start(namespace, "wrong", "--units=0")
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "FailJob" in printed or "PodFailurePolicy" in printed, printed
    assert "--units=0" in printed.rpartition("exited with code 2")[2]
    assert time.monotonic() - began < 300
    for index in range(2):
        assert len(pods(core, namespace, "wrong", index)) <= 1


def test_a_cancelled_job_leaves_its_name_when_its_pods_are_gone(core: Any, namespace: str) -> None:
    process = start(namespace, "cancelled")
    try:
        for line in process.stdout:
            if "pretrain step 50/" in line:
                break
        cancel = [sys.executable, "-m", "launch.main", "cancel", "cancelled", "--platform=k8s"]
        subprocess.run([*cancel, f"--namespace={namespace}"], cwd=REPOSITORY, check=True)
        rest, _ = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1 and "Job cancelled was deleted" in rest
    for index in range(2):
        assert pods(core, namespace, "cancelled", index) == []
    services = core.list_namespaced_service(namespace).items
    assert "cancelled" not in [service.metadata.name for service in services]
