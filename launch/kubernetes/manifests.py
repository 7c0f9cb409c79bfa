"""Workers as the pods of a Kubernetes job: fills the manifests in k8s/ from flags.

`render` is what `kubectl kustomize k8s/overlays/OVERLAY` does, with values from flags. It knows of
Kustomize only what those folders use: resources, replacements, and the annotation local-config.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.kubernetes.options import KubernetesOptions

_HERE = Path(__file__).resolve().parents[1]
# In a wheel they are in this package, in a checkout beside it.
MANIFESTS = _HERE / "k8s" if (_HERE / "k8s").is_dir() else _HERE.parent / "k8s"
JOB_KINDS = ("Job", "JobSet", "MPIJob", "TrainJob")  # of the overlays
_TEMPLATE = ("Job", "warmstate-template")
_ELASTIC = ("Job", "warmstate-elastic")
_GPU_NODES = ("Job", "warmstate-gpu-nodes")
_LOCAL = "config.kubernetes.io/local-config"
_GPU = "nvidia.com/gpu"
_MISSING = object()
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
SHARED_RUNTIME = KubernetesOptions(overlay="trainjob", workers=2)  # of all TrainJobs
Document = dict[str, Any]


def render(options: KubernetesOptions, trainer_flags: Sequence[str] = ()) -> list[Document]:
    """Returns the objects to create, in that order, as `kubectl kustomize` would.

    Args:
        trainer_flags: Flags of each worker; without them, those of the manifests. Relative paths
            start from /app, whose `runs` is a volume.
    """
    resources, replacements = _load(MANIFESTS / "overlays" / options.kind)
    _fill(resources, options, trainer_flags)
    _replace(resources, replacements)
    documents = [
        document
        for document in resources.values()
        if _LOCAL not in document["metadata"].get("annotations", {})
    ]
    for index, document in enumerate(documents):
        if document["kind"] != "ClusterTrainingRuntime":
            if options.namespace:
                document["metadata"]["namespace"] = options.namespace
        elif options != SHARED_RUNTIME or trainer_flags:  # what is this job's is in the TrainJob
            documents[index] = next(
                each for each in render(SHARED_RUNTIME) if each["kind"] == document["kind"]
            )
    # What others refer to comes first.
    return sorted(documents, key=lambda document: document["kind"] in JOB_KINDS)


def to_yaml(documents: Sequence[Document]) -> str:
    """Returns `documents` as `kubectl apply -f -` reads them."""
    return yaml.safe_dump_all(documents, sort_keys=False, width=10_000)


def _load(folder: Path) -> tuple[dict[tuple[str, str], Document], list[Document]]:
    """Returns a kustomization's objects by kind and name, and its replacements."""
    kustomization = yaml.load((folder / "kustomization.yaml").read_text(), _LOADER)  # noqa: S506
    known = {"apiVersion", "kind", "resources", "replacements"}
    if unknown := kustomization.keys() - known:
        raise ValueError(f"{folder}/kustomization.yaml: {', '.join(sorted(unknown))}: not known")
    resources: dict[tuple[str, str], Document] = {}
    replacements: list[Document] = []
    for entry in kustomization["resources"]:
        path = folder / entry
        if path.is_dir():
            inner, inner_replacements = _load(path)
            resources |= inner
            replacements += inner_replacements
        else:
            for document in yaml.load_all(path.read_text(), _LOADER):
                resources[document["kind"], document["metadata"]["name"]] = document
    return resources, replacements + kustomization.get("replacements", [])


def _replace(
    resources: Mapping[tuple[str, str], Document], replacements: Sequence[Document]
) -> None:
    for replacement in replacements:
        source = replacement["source"]
        origin = resources[source["kind"], source["name"]]
        holder, key = _find(origin, source.get("fieldPath", "metadata.name"), create=False)
        for target in replacement["targets"]:
            document = resources[target["select"]["kind"], target["select"]["name"]]
            create = target.get("options", {}).get("create", False)
            for path in target["fieldPaths"]:
                place, name = _find(document, path, create)
                place[name] = copy.deepcopy(holder[key])


def _find(document: Document, path: str, create: bool) -> tuple[Any, Any]:
    """Returns the mapping or list that holds the field, and the field's key in it."""
    holder: Any = None
    key: Any = None
    value: Any = document
    for word in re.findall(r"\[[^]]*\]|[^.]+", path):
        if value is _MISSING:  # of a field that is to be made
            value = holder[key] = {}
        holder = value
        name, equals, wanted = word.strip("[]").partition("=")
        if isinstance(holder, list):
            key = (
                next(i for i, item in enumerate(holder) if item.get(name) == wanted)
                if equals
                else int(name)
            )
        else:
            key = name
        value = holder.get(key, _MISSING) if isinstance(holder, dict) else holder[key]
        if value is _MISSING and not create:
            raise ValueError(f"{path}: there is no {word}")
    return holder, key


def _fill(
    resources: dict[tuple[str, str], Document],
    options: KubernetesOptions,
    trainer_flags: Sequence[str],
) -> None:
    """Writes `options` where `_replace` takes values from."""
    for (kind, name), document in resources.items():
        if name == "warmstate" and kind != "ClusterTrainingRuntime":
            document["metadata"]["name"] = options.job_name
    claims = {"warmstate-runs": options.run_volume, "warmstate-data": options.data_volume}
    for name, given in claims.items():
        if given:
            claim = resources["PersistentVolumeClaim", name]
            claim["metadata"] |= {"name": given, "annotations": {_LOCAL: "true"}}
    _fill_template(resources[_TEMPLATE]["spec"], options)
    if trainer_flags:
        (trainer,) = resources[_TEMPLATE]["spec"]["template"]["spec"]["containers"]
        # Kubernetes puts a variable's value for $(NAME), and $ for $$.
        trainer["args"] = [flag.replace("$", "$$") for flag in trainer_flags]
    if _ELASTIC in resources:
        _fill_elastic(resources[_ELASTIC]["spec"], options)
    if _GPU_NODES in resources and options.gpus_per_worker:
        _set_gpus(resources[_GPU_NODES]["spec"], options.gpus_per_worker)
    (kind,) = {kind for kind, name in resources if kind in JOB_KINDS and name == "warmstate"}
    job = resources[kind, "warmstate"]
    if options.queue:
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
    if kind == "MPIJob":
        _fill_mpi_job(job["spec"], options)
    elif kind != "Job":
        job["spec"]["suspend"] = bool(options.queue)
    if kind == "TrainJob":
        _fill_train_job(job["spec"], options)


def _fill_template(spec: Document, options: KubernetesOptions) -> None:
    workers = options.workers or 1
    if options.max_restarts is not None:
        spec["backoffLimitPerIndex"] = options.max_restarts
    spec["completions"] = spec["parallelism"] = workers
    spec["suspend"] = bool(options.queue)
    pod = spec["template"]["spec"]
    pod["nodeSelector"] |= options.node_labels
    (trainer,) = pod["containers"]
    trainer["image"] = options.image or trainer["image"]
    if options.gpus_per_worker:
        _set_gpus(spec, options.gpus_per_worker)
    (hosts,) = (each for each in trainer["env"] if each["name"] == "WARMSTATE_HOSTS")
    hosts["value"] = hosts["value"].replace("[0-1]", f"[0-{workers - 1}]")


def _set_gpus(spec: Document, count: int) -> None:
    (trainer,) = spec["template"]["spec"]["containers"]
    for amounts in trainer["resources"].values():
        amounts[_GPU] = str(count)


def _fill_elastic(spec: Document, options: KubernetesOptions) -> None:
    largest = options.max_workers or 1
    (trainer,) = spec["template"]["spec"]["containers"]
    numbers = {
        "--min_workers": options.min_workers,
        "--max_workers": largest,
        "--workers": options.workers or largest,
    }
    names = [word.partition("=")[0] for word in trainer["command"]]
    trainer["command"] = [
        f"{name}={numbers[name]}" if name in numbers else word
        for name, word in zip(names, trainer["command"], strict=True)
        if options.with_horovod or name != "--distributor"
    ]
    # What every other overlay's pod has for its one worker.
    (one,) = _load(MANIFESTS / "base")[0][_TEMPLATE]["spec"]["template"]["spec"]["containers"]
    for amounts, of_one in zip(
        trainer["resources"].values(), one["resources"].values(), strict=True
    ):
        amounts["cpu"] = str(int(of_one["cpu"]) * largest)
        amounts["memory"] = f"{int(of_one['memory'].removesuffix('Gi')) * largest}Gi"
        if options.gpus_per_worker:
            amounts[_GPU] = str(options.gpus_per_worker * largest)


def _fill_mpi_job(spec: Document, options: KubernetesOptions) -> None:
    policy = spec["runPolicy"]
    policy["suspend"] = bool(options.queue)
    if options.max_restarts is not None:
        policy["backoffLimit"] = options.max_restarts
    command = spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["command"]
    command[command.index("-np") + 1] = str(options.workers or 1)


def _fill_train_job(spec: Document, options: KubernetesOptions) -> None:
    trainer = spec["trainer"]
    if options.image:
        trainer["image"] = options.image
    if options.gpus_per_worker:  # merged with the runtime's CPUs and memory
        count = str(options.gpus_per_worker)
        trainer["resourcesPerNode"] = {kind: {_GPU: count} for kind in ("limits", "requests")}
    pod: Document = {}
    if labels := options.node_labels:
        pod["nodeSelector"] = labels
    claims = {"runs": options.run_volume, "data": options.data_volume}
    volumes = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}}
        for name, claim in claims.items()
        if claim
    ]
    if volumes:
        pod["volumes"] = volumes
    if pod:
        template = {"spec": {"template": {"spec": pod}}}
        jobs = {"spec": {"replicatedJobs": [{"name": "node", "template": template}]}}
        runtime = {"template": jobs}
        spec["runtimePatches"] = [{"manager": "warmstate.launch", "trainingRuntimeSpec": runtime}]
