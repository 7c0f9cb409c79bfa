"""Runs the pods of a rendered Indexed Job here, as the Job controller and a kubelet would.

What is real: the command, with the pod's environment and nothing else, as the pod's user without
capabilities, under a root file system that is read-only but for the pod's mounts, in namespaces of
its own for network and host name, under the host names of the headless Service; TERM, grace period,
KILL; a new pod with a new address in place of a failed one; `podFailurePolicy`, `backoffLimit`,
`backoffLimitPerIndex`, `successPolicy`, `suspend`.
What is not: images (this checkout and its virtual environment take their place), limits of memory
and CPU, seccomp, scheduling, and what kills a pod without a word to the controller. The
controller's pauses before it makes a pod again are noted, not waited for.

Needs root, and `ip`, `unshare` and `setpriv` (Debian: iproute2, util-linux).
"""

import contextlib
import itertools
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.programs import REPOSITORY

INDEX = "batch.kubernetes.io/job-completion-index"
# Where k8s/Dockerfile has it, and where no volume of a pod hides it.
_VIRTUAL_ENVIRONMENT = "/opt/venv"
# What k8s/Dockerfile sets.
IMAGE_ENVIRONMENT = {
    "PATH": f"{_VIRTUAL_ENVIRONMENT}/bin:/usr/local/bin:/usr/bin:/bin",
    "PYTHONPATH": "/app",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_IMAGE_FOLDERS = ("/usr", "/bin", "/lib", "/lib64", "/etc", sys.base_prefix)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_MESSAGE_BYTES, _MESSAGE_LINES = 2048, 80  # of FallbackToLogsOnError
_QUANTITY = {"m": 1e-3, "": 1}
_SUBNET = "10.213.9"


def ip(*words: str) -> None:
    """Runs `ip`; raises CalledProcessError if it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Pod:
    """One pod, from its creation to its end.

    Attributes:
      manifest: as the controller made it.
      deleted: whether somebody asked for its end.
      disrupted: whether that was a disruption, such as an eviction.
      lines: printed so far.
      exit_code: None while it runs.
    """

    name: str
    index: int
    manifest: dict[str, Any]
    process: subprocess.Popen[bytes]
    deleted: bool = False
    disrupted: bool = False
    lines: list[str] = field(default_factory=list)
    exit_code: int | None = None
    killer: threading.Timer | None = None
    watcher: threading.Thread | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """Returns the pod's `spec`."""
        return self.manifest["spec"]

    @property
    def termination_message(self) -> str:
        """Returns what the kubelet would put into `terminated.message`."""
        (container,) = self.spec["containers"]
        fallback = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not self.exit_code or not fallback:
            return ""
        text = "".join(self.lines[-_MESSAGE_LINES:])
        return text.encode()[-_MESSAGE_BYTES:].decode(errors="replace")


class Network:
    """A switch, and a network namespace with an address on it for each pod."""

    def __init__(self) -> None:
        self._switch = f"warm{os.getpid()}"
        self._numbers = itertools.count(1)
        self._namespaces: list[str] = []

    @contextlib.contextmanager
    def opened(self) -> Iterator["Network"]:
        """Makes the switch; removes all namespaces at the end."""
        try:
            self._add(self._switch)
            ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            ip("-n", self._switch, "link", "set", "switch", "up")
            yield self
        finally:
            for name in list(self._namespaces):
                self.remove(name)

    def add_pod(self) -> tuple[str, str]:
        """Returns the namespace and the address of one more pod."""
        number = next(self._numbers)
        name, cable = f"{self._switch}p{number}", f"cable{number}"
        self._add(name)
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", cable, "netns", self._switch)
        ip("-n", self._switch, "link", "set", cable, "master", "switch", "up")
        ip("-n", name, "address", "add", f"{_SUBNET}.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        return name, f"{_SUBNET}.{number}"

    def remove(self, name: str) -> None:
        """Removes a namespace and its cable."""
        self._namespaces.remove(name)
        ip("netns", "delete", name)

    def _add(self, name: str) -> None:
        ip("netns", "add", name)
        self._namespaces.append(name)


class IndexedJob:
    """A Job and its controller.

    Attributes:
      pods: all that were made, oldest first.
      condition: type and reason once the Job has ended.
      counted: failures that count against the limits, those that `podFailurePolicy` ignores apart.
      pauses: seconds that the controller would have waited before each pod that it made again.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        service: Mapping[str, Any] | None,
        claims: Mapping[str, Path],
        folder: Path,
        network: Network,
    ):
        self._job, self._service, self._claims = job, service, claims
        self._folder, self._network = folder, network
        self._spec = job["spec"]
        self._names = itertools.count()
        self._events: queue.Queue[tuple[Pod, str | None]] = queue.Queue()
        self._addresses: dict[str, str] = {}
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        (folder / "resolv.conf").touch()
        self.pods: list[Pod] = []
        self.condition: tuple[str, str] | None = None
        self.counted = 0
        self.pauses: list[float] = []
        self._counted_of_index: Counter[int] = Counter()
        self._verdict: tuple[str, str] | None = None  # the condition, once all pods have ended

    def start(self) -> None:
        """Makes the pods of all indexes, unless the Job is suspended."""
        if not self._spec.get("suspend"):
            for index in range(self._spec["completions"]):
                self._make_pod(index)

    def resume(self) -> None:
        """Does what Kueue does when there is room."""
        self._spec["suspend"] = False
        self.start()

    def running(self, index: int) -> Pod:
        """Returns the pod that runs with this index."""
        (pod,) = (pod for pod in self.pods if pod.index == index and pod.exit_code is None)
        return pod

    def delete(self, pod: Pod, disruption: bool = False) -> None:
        """Asks for the pod's end: TERM, and KILL after its grace period."""
        pod.deleted, pod.disrupted = True, disruption
        pod.process.send_signal(signal.SIGTERM)
        pod.killer = threading.Timer(
            pod.spec["terminationGracePeriodSeconds"], _kill_group, [pod.process]
        )
        pod.killer.start()

    def wait_for_line(self, pattern: str, timeout_seconds: float = 600) -> Pod:
        """Returns the pod that first prints a line with `pattern`, from now on."""
        limit = time.monotonic() + timeout_seconds
        while self.condition is None:
            pod, line = self._next_event(limit)
            if line is not None and re.search(pattern, line):
                return pod
        raise AssertionError(f"the Job ended, {self.condition}:\n{self.log()}")

    def wait(self, timeout_seconds: float = 600) -> tuple[str, str]:
        """Returns the Job's condition when it has ended."""
        limit = time.monotonic() + timeout_seconds
        while self.condition is None:
            self._next_event(limit)
        return self.condition

    def log(self) -> str:
        """Returns what all pods printed."""
        return "".join(
            f"[{pod.name}] {line}"
            for pod in self.pods
            for line in [*pod.lines, f"exit code {pod.exit_code}\n"]
        )

    def close(self) -> None:
        """Ends what still runs."""
        for pod in self.pods:
            if pod.killer:
                pod.killer.cancel()
            if pod.exit_code is None:
                _kill_group(pod.process)
            pod.watcher.join()

    def _next_event(self, limit: float) -> tuple[Pod, str | None]:
        try:
            pod, line = self._events.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"nothing happened in time:\n{self.log()}") from None
        if line is None:
            self._note_end(pod)
        return pod, line

    def _note_end(self, pod: Pod) -> None:
        if pod.killer:
            pod.killer.cancel()
        if self._verdict is None:
            self._judge(pod)
        if self._verdict is None:
            if pod.exit_code:
                failed = [each.index for each in self.pods if each.exit_code]
                pause = backoff_seconds(self._spec, failed.count(pod.index), len(failed))
                self.pauses.append(pause)
                self._make_pod(pod.index)
            elif all(self._has_succeeded(i) for i in range(self._spec["completions"])):
                self.condition = ("Complete", "CompletionsReached")
            return
        rest = [each for each in self.pods if each.exit_code is None]
        for each in rest:
            if not each.deleted:
                self.delete(each)
        if not rest:
            self.condition = self._verdict

    def _judge(self, pod: Pod) -> None:
        """Counts a failure, and sets the verdict if this end is the Job's."""
        if pod.exit_code == 0:
            rules = self._spec.get("successPolicy", {}).get("rules", [])
            if any(self._meets(rule) for rule in rules):
                self._verdict = ("Complete", "SuccessPolicy")
            return
        action = failure_action(self._spec.get("podFailurePolicy", {}), pod)
        if action == "FailJob":
            self._verdict = ("Failed", "PodFailurePolicy")
        elif action == "Count":
            self.counted += 1
            self._counted_of_index[pod.index] += 1
            per_index = self._spec.get("backoffLimitPerIndex")
            if per_index is None and self.counted > self._spec["backoffLimit"]:
                self._verdict = ("Failed", "BackoffLimitExceeded")
            elif per_index is not None and self._counted_of_index[pod.index] > per_index:
                assert self._spec["maxFailedIndexes"] == 0
                self._verdict = ("Failed", "MaxFailedIndexesExceeded")
        else:
            assert action == "Ignore", action

    def _has_succeeded(self, index: int) -> bool:
        return any(pod.index == index and pod.exit_code == 0 for pod in self.pods)

    def _meets(self, rule: Mapping[str, Any]) -> bool:
        (index,) = map(int, rule["succeededIndexes"].split(","))
        return self._has_succeeded(index)

    def _make_pod(self, index: int) -> None:
        manifest = pod_manifest(self._job, index, f"{next(self._names):05d}")
        spec = manifest["spec"]
        namespace, address = self._network.add_pod()
        self._publish(manifest, address)
        place = self._folder / manifest["metadata"]["name"]
        place.mkdir()
        (container,) = spec["containers"]
        user = spec["securityContext"]
        environment = container_environment(manifest, IMAGE_ENVIRONMENT)
        words = [_expand(word, environment) for word in container["command"] + container["args"]]
        command = ["ip", "netns", "exec", namespace, "unshare", "--mount", "--uts"]
        # Else the command were process 1, for which the kernel drops signals without a handler.
        assert spec["shareProcessNamespace"]
        command += ["/bin/sh", "-ec", self._root_script(place, spec, container), "pod"]
        command += [f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}"]
        command += [f"--groups={user['fsGroup']}", "--bounding-set=-all", "--inh-caps=-all"]
        command += [
            "--no-new-privs",
            "--pdeathsig=KILL",
            "env",
            "-i",
            f"--chdir={container['workingDir']}",
        ]
        command += [f"{name}={value}" for name, value in environment.items()]
        process = subprocess.Popen(
            [*command, *words],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOST": spec["hostname"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        pod = Pod(manifest["metadata"]["name"], index, manifest, process)
        self.pods.append(pod)
        pod.watcher = threading.Thread(target=self._watch, args=[pod], daemon=True)
        pod.watcher.start()

    def _watch(self, pod: Pod) -> None:
        """Passes on a pod's lines, then its end."""
        reader = threading.Thread(target=self._read, args=[pod], daemon=True)
        reader.start()
        os.waitid(os.P_PID, pod.process.pid, os.WEXITED | os.WNOWAIT)
        _kill_group(pod.process)  # what is left in the container
        code = pod.process.wait()
        reader.join()
        pod.process.stdout.close()
        pod.exit_code = code if code >= 0 else 128 - code
        self._events.put((pod, None))

    def _read(self, pod: Pod) -> None:
        for line in pod.process.stdout:
            pod.lines.append(line.decode(errors="replace"))
            self._events.put((pod, pod.lines[-1]))

    def _publish(self, manifest: Mapping[str, Any], address: str) -> None:
        """Writes the names of all pods that the headless Service selects, ready or not."""
        labels, spec = manifest["metadata"]["labels"], manifest["spec"]
        if self._service is None:  # the kubelet writes a pod's own name
            self._hosts.write_text(f"127.0.0.1 localhost\n{address} {spec['hostname']}\n")
            return
        service = self._service["spec"]
        assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
        if service["selector"].items() <= labels.items():
            domain = self._service["metadata"]["name"]
            if spec.get("subdomain") == domain:
                self._addresses[f"{spec['hostname']}.{domain}"] = address
        lines = [f"{address} {name}\n" for name, address in self._addresses.items()]
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))

    def _root_script(self, place: Path, spec: Mapping, container: Mapping) -> str:
        """Returns the shell script that makes the pod's file system and becomes its command."""
        root = place / "root"
        root.mkdir()
        assert container["securityContext"]["readOnlyRootFilesystem"]
        lines = ['echo "$HOST" >/proc/sys/kernel/hostname']
        lines += ["mount --make-rprivate /", f"mount -t tmpfs -o mode=755 tmpfs {root}"]

        def bind(source: str | Path, target: str, options: str = "bind,ro") -> None:
            make = "mkdir -p" if Path(source).is_dir() else "touch"
            lines.append(f"{make} {root}{target}; mount -o {options} {source} {root}{target}")

        for folder in filter(os.path.isdir, _IMAGE_FOLDERS):
            bind(folder, folder)
        bind(sys.prefix, _VIRTUAL_ENVIRONMENT)
        for package in ("trainer", "data_pipelines", "launch"):
            bind(REPOSITORY / package, f"/app/{package}")
        for name in ("hosts", "resolv.conf"):
            lines.append(f"mount -o bind,ro {self._folder}/{name} {root}/etc/{name}")
        lines.append(f"mkdir {root}/dev")
        for device in _DEVICES:
            bind(f"/dev/{device}", f"/dev/{device}", "bind")
        lines.append(f"mkdir {root}/proc; mount -t proc proc {root}/proc")
        for mount in container["volumeMounts"]:
            (volume,) = (each for each in spec["volumes"] if each["name"] == mount["name"])
            bind(self._volume(place, volume, spec), mount["mountPath"], "bind")
        lines.append(f"mount -o remount,ro {root}")
        lines.append(f'exec chroot {root} setpriv "$@"')
        return "\n".join(lines)

    def _volume(self, place: Path, volume: Mapping[str, Any], spec: Mapping) -> Path:
        """Returns the folder of a volume, which the pod's `fsGroup` may write."""
        if "emptyDir" in volume:
            folder = place / volume["name"]
            folder.mkdir()
        else:
            folder = self._claims[volume["persistentVolumeClaim"]["claimName"]]
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, -1, spec["securityContext"]["fsGroup"])
            path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else 0o660))
        return folder


@contextlib.contextmanager
def indexed_job(
    documents: Sequence[Mapping[str, Any]], claims: Mapping[str, Path], folder: Path
) -> Iterator[IndexedJob]:
    """Runs the Job among `documents`; ends all that it started.

    Args:
      claims: the folder that stands for each claim, by the claim's name.
      folder: what is not in a volume goes here.
    """
    missing = [name for name in ("ip", "unshare", "setpriv") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and programs; missing: {', '.join(missing) or 'root'}")
    by_kind = {document["kind"]: document for document in documents}
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network().opened())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        job = IndexedJob(by_kind["Job"], by_kind.get("Service"), claims, folder, network)
        stack.callback(job.close)
        job.start()
        yield job


def backoff_seconds(spec: Mapping[str, Any], of_index: int, of_job: int) -> float:
    """Returns the Job controller's pause before it makes a pod again.

    Ten seconds after the first failure, twice as long after each further one, 600 s at most. The
    failures that `podFailurePolicy` ignores count as well.

    Args:
      of_index: failed pods of the index.
      of_job: failed pods of the Job, which count without `backoffLimitPerIndex`.
    """
    failures = of_index if "backoffLimitPerIndex" in spec else of_job
    return float(min(10 * 2 ** (failures - 1), 600))


def failure_action(policy: Mapping[str, Any], pod: Pod) -> str:
    """Returns the action of the first rule of a `podFailurePolicy` that a failed pod meets."""
    (container,) = pod.spec["containers"]
    for rule in policy.get("rules", []):
        codes = rule.get("onExitCodes")
        if codes and codes.get("containerName", container["name"]) == container["name"]:
            assert 0 not in codes["values"] or codes["operator"] == "NotIn"
            if (pod.exit_code in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"]
        for condition in rule.get("onPodConditions", []):
            if condition == {"type": "DisruptionTarget", "status": "True"} and pod.disrupted:
                return rule["action"]
    return "Count"


def pod_manifest(job: Mapping[str, Any], index: int, suffix: str) -> dict[str, Any]:
    """Returns the pod that the Job controller makes for an index."""
    template, name = job["spec"]["template"], job["metadata"]["name"]
    assert template["spec"]["restartPolicy"] == "Never"
    own = {INDEX: str(index)}
    labels = template["metadata"]["labels"] | own | {"batch.kubernetes.io/job-name": name}
    (container,) = template["spec"]["containers"]
    indexed = {"name": "JOB_COMPLETION_INDEX", "value": str(index)}
    container = container | {"env": [*container.get("env", []), indexed]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{name}-{index}-{suffix}",
            "labels": labels,
            "annotations": own,
        },
        "spec": template["spec"] | {"hostname": f"{name}-{index}", "containers": [container]},
    }


def container_environment(
    pod: Mapping[str, Any], image_environment: Mapping[str, str]
) -> dict[str, str]:
    """Returns what the kubelet gives the pod's container, over what its image sets."""
    (container,) = pod["spec"]["containers"]
    values = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    for entry in container["env"]:
        if "value" in entry:
            values[entry["name"]] = _expand(entry["value"], values)
        else:
            values[entry["name"]] = _from_field(entry["valueFrom"], pod, container)
    return {**image_environment, "HOSTNAME": pod["spec"]["hostname"], **values}


def _from_field(source: Mapping[str, Any], pod: Mapping[str, Any], container: Mapping) -> str:
    if "resourceFieldRef" in source:
        of, _, name = source["resourceFieldRef"]["resource"].partition(".")
        number, unit = re.fullmatch(r"([\d.]+)(\w*)", container["resources"][of][name]).groups()
        return str(math.ceil(float(number) * _QUANTITY[unit]))
    path = source["fieldRef"]["fieldPath"]
    label = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if label:
        return pod["metadata"][label[1]][label[2]]
    assert path == "metadata.name", path
    return pod["metadata"]["name"]


def _expand(text: str, values: Mapping[str, str]) -> str:
    """Returns `text` with $(NAME) replaced where NAME is known, and $$ by $."""
    return re.sub(
        r"\$(\$|\(([-._a-zA-Z0-9]+)\))",
        lambda match: "$" if match[1] == "$" else values.get(match[2], match[0]),
        text,
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
