"""Runs the pods of a rendered Indexed Job here, as the Job controller and a kubelet would.

What is real: the command, with the pod's environment and nothing else, as the pod's user without
capabilities, under a root file system that is read-only but for the pod's mounts, in separate
namespaces for network, processes and host name, under the host names of the headless Service;
`preStop`, TERM, grace period, KILL; a new pod with a new address in place of a failed one;
`podFailurePolicy`, `backoffLimit`, `backoffLimitPerIndex`, `successPolicy`, `suspend`.
What is not: images (this checkout and its virtual environment take their place), limits of memory
and CPU, seccomp, scheduling, and what kills a pod without a word to the controller. The
controller's pauses before it makes a pod again are noted, not waited for.

`PaperKubelet` runs no process: a test says how its pods end. It is for hundreds of pods.

Needs root, and `ip`, `nsenter`, `unshare` and `setpriv` (Debian: iproute2, util-linux).
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.programs import REPOSITORY
from tests.s3_server import PACKAGES as S3_PACKAGES

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
_IMAGE_FOLDERS = ("/usr", "/bin", "/lib", "/lib64", sys.base_prefix)  # and a copy of /etc
_DEVICES = ("null", "zero", "full", "random", "urandom")
_IMAGE_FILES = (
    "trainer",
    "data_pipelines",
    "launch",
    "k8s/sshd_config",
    "k8s/stop_trainers.sh",
)
# The user and the ssh configuration that k8s/Dockerfile makes.
_USER = "warmstate:x:10001:10001::/home/warmstate:/bin/bash"
_SSH_CONFIG = re.search(r"printf '(Host .+)'", (REPOSITORY / "k8s" / "Dockerfile").read_text())[1]
NAMESPACE = "default"
_MESSAGE_BYTES, _MESSAGE_LINES = 2048, 80  # of FallbackToLogsOnError
_QUANTITY = {"m": 1e-3, "": 1}
_SUBNET = "10.213.9"


def ip(*words: str) -> None:
    """Runs `ip`; raises CalledProcessError if it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(eq=False)
class Pod:
    """One pod, from its creation to its end.

    Attributes:
        manifest: As the controller made it.
        deleted: Whether somebody asked for its end.
        disrupted: Whether that was a disruption, such as an eviction.
        lines: Printed so far.
        restarts: Of its container, with `restartPolicy: OnFailure`.
        exit_code: None while it runs.
    """

    name: str
    index: int
    manifest: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    deleted: bool = False
    disrupted: bool = False
    lines: list[str] = field(default_factory=list)
    restarts: int = 0
    exit_code: int | None = None
    network_namespace: str = ""
    address: str = ""
    hosts: Path | None = None
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


class Kubelet:
    """Runs pods as processes, and serves the names that a headless Service gives them.

    Attributes:
        pods: All that were made, oldest first.
        events: Each line of a pod as it is printed; None instead of a line when the pod has ended.
    """

    def __init__(
        self,
        claims: Mapping[str, Path],
        folder: Path,
        network: Network,
        service: Mapping[str, Any] | None = None,
    ):
        """Makes a node without pods.

        Args:
            claims: Folder of each PersistentVolumeClaim, ConfigMap and Secret, by its name.
            service: The headless Service, if there is one.
        """
        self._claims, self._folder, self._network = claims, folder, network
        self._service = service
        self._addresses: dict[str, str] = {}
        (folder / "resolv.conf").touch()
        # A virtual environment's scripts name its Python, which is elsewhere in a pod.
        self._horovodrun = folder / "horovodrun"
        script = Path(sys.prefix) / "bin" / "horovodrun"
        if script.exists():
            _, _, body = script.read_text().partition("\n")
            self._horovodrun.write_text(f"#!{_VIRTUAL_ENVIRONMENT}/bin/python\n{body}")
            self._horovodrun.chmod(0o755)
        self.pods: list[Pod] = []
        self.events: queue.Queue[tuple[Pod, str | None]] = queue.Queue()

    def add_network(self) -> tuple[str, str]:
        """Returns a network namespace and its address, for a server that pods reach."""
        return self._network.add_pod()

    def run(self, manifest: dict[str, Any], index: int) -> Pod:
        """Starts a pod."""
        namespace, address = self._network.add_pod()
        place = self._folder / f"{manifest['metadata']['name']}-{len(self.pods)}"
        place.mkdir()
        pod = Pod(manifest["metadata"]["name"], index, manifest)
        pod.network_namespace, pod.address, pod.hosts = namespace, address, place / "hosts"
        self.pods.append(pod)
        self._publish(pod)
        words = self._command(manifest, namespace, place)
        pod.process = self._process(words, manifest)
        pod.watcher = threading.Thread(target=self._watch, args=[pod, words], daemon=True)
        pod.watcher.start()
        return pod

    def delete(self, pod: Pod, disruption: bool = False) -> None:
        """Asks for the pod's end: `preStop`, TERM, and KILL after its grace period."""
        pod.deleted, pod.disrupted = True, disruption
        grace_seconds = pod.spec.get("terminationGracePeriodSeconds", 30)
        pod.killer = threading.Timer(grace_seconds, _kill_group, [pod.process])
        pod.killer.start()
        threading.Thread(target=self._stop, args=[pod], daemon=True).start()

    def wait_until_ready(self, pod: Pod, timeout_seconds: float = 60) -> None:
        """Waits until the pod's `readinessProbe` can connect."""
        (container,) = pod.spec["containers"]
        name = container["readinessProbe"]["tcpSocket"]["port"]
        (port,) = (each["containerPort"] for each in container["ports"] if each["name"] == name)
        probe = ["ip", "netns", "exec", pod.network_namespace]
        probe += ["bash", "-c", f"exec 2>/dev/null </dev/tcp/{pod.address}/{port}"]
        limit = time.monotonic() + timeout_seconds
        while subprocess.run(probe).returncode:
            assert pod.exit_code is None and time.monotonic() < limit, "".join(pod.lines)
            time.sleep(0.1)

    def close(self) -> None:
        """Ends what still runs."""
        for pod in self.pods:
            pod.deleted = True
            if pod.killer:
                pod.killer.cancel()
            if pod.exit_code is None:
                _kill_group(pod.process)
            pod.watcher.join()

    def _command(self, manifest: Mapping[str, Any], namespace: str, place: Path) -> list[str]:
        spec = manifest["spec"]
        (container,) = spec["containers"]
        user = spec["securityContext"]
        environment = container_environment(manifest, IMAGE_ENVIRONMENT)
        # The pause container is process 1 of the pod. Else the command were, and the kernel drops
        # signals for which process 1 has no handler.
        assert spec["shareProcessNamespace"]
        command = ["setpriv", "--pdeathsig=KILL", "ip", "netns", "exec", namespace]
        command += ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL"]
        command += ["/bin/sh", "-ec", self._root_script(place, spec, container), "pod"]
        command += [f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}"]
        command += [f"--groups={user['fsGroup']}", "--bounding-set=-all", "--inh-caps=-all"]
        command += ["--no-new-privs", "env", "-i", f"--chdir={container['workingDir']}"]
        command += [f"{name}={value}" for name, value in environment.items()]
        return command + [
            _expand(word, environment) for word in container["command"] + container["args"]
        ]

    def _process(
        self, command: Sequence[str], manifest: Mapping[str, Any]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOST": manifest["spec"]["hostname"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _stop(self, pod: Pod) -> None:
        (container,) = pod.spec["containers"]
        inside = _container_process(pod)
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec")
        if inside and hook:
            user = pod.spec["securityContext"]
            enter = ["nsenter", f"--target={inside}"]
            enter += ["--mount", "--uts", "--net", "--pid", "--root"]
            enter += [f"--setuid={user['runAsUser']}", f"--setgid={user['runAsGroup']}", "--"]
            environment = container_environment(pod.manifest, IMAGE_ENVIRONMENT)
            enter += ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
            enter += hook["command"]
            done = subprocess.run(enter, cwd="/", capture_output=True, text=True)
            pod.lines.append(f"preStop ended with {done.returncode}: {done.stdout}{done.stderr}\n")
        if inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(inside, signal.SIGTERM)

    def _watch(self, pod: Pod, command: Sequence[str]) -> None:
        """Passes on a pod's lines, then its end; restarts its container if the pod says so."""
        while True:
            reader = threading.Thread(target=self._read, args=[pod, pod.process], daemon=True)
            reader.start()
            code = pod.process.wait()
            _kill_group(pod.process)
            reader.join()
            pod.process.stdout.close()
            if code == 0 or pod.deleted or pod.spec["restartPolicy"] != "OnFailure":
                break
            pod.restarts += 1
            pod.process = self._process(command, pod.manifest)
        pod.exit_code = code if code >= 0 else 128 - code
        self.events.put((pod, None))

    def _read(self, pod: Pod, process: subprocess.Popen[bytes]) -> None:
        for line in process.stdout:
            pod.lines.append(line.decode(errors="replace"))
            self.events.put((pod, pod.lines[-1]))

    def _publish(self, pod: Pod) -> None:
        """Writes the names of all pods that the headless Service selects, ready or not."""
        if self._service is not None:
            labels, domain = pod.manifest["metadata"]["labels"], self._service["metadata"]["name"]
            assert self._service["spec"]["clusterIP"] == "None"
            is_selected = self._service["spec"]["selector"].items() <= labels.items()
            if is_selected and pod.spec.get("subdomain") == domain:
                self._addresses[f"{pod.spec['hostname']}.{domain}"] = pod.address
        lines = [
            f"{address} {name} {name}.{NAMESPACE}.svc\n"
            for name, address in self._addresses.items()
        ]
        for each in self.pods:
            own = f"127.0.0.1 localhost\n{each.address} {each.spec['hostname']}\n"
            each.hosts.write_text(own + "".join(lines))

    def _root_script(self, place: Path, spec: Mapping, container: Mapping) -> str:
        """Returns the shell script that makes the pod's file system and runs its command."""
        root = place / "root"
        root.mkdir()
        assert container["securityContext"]["readOnlyRootFilesystem"]
        lines = ['echo "$HOST" >/proc/sys/kernel/hostname']
        lines += ["mount --make-rprivate /", f"mount -t tmpfs -o mode=755 tmpfs {root}"]

        def bind(source: str | Path, target: str, options: str = "bind,ro") -> None:
            make = "mkdir -p" if Path(source).is_dir() else "touch"
            lines.append(f"[ -e {root}{target} ] || {make} {root}{target}")
            lines.append(f"mount -o {options} {source} {root}{target}")

        for folder in filter(os.path.isdir, _IMAGE_FOLDERS):
            bind(folder, folder)
        if S3_PACKAGES.is_dir():
            bind(S3_PACKAGES, "/opt/s3")
        bind(sys.prefix, _VIRTUAL_ENVIRONMENT)
        if self._horovodrun.exists():
            bind(self._horovodrun, f"{_VIRTUAL_ENVIRONMENT}/bin/horovodrun")
        lines.append(f"mkdir -p {root}/app/k8s")
        for name in _IMAGE_FILES:
            bind(REPOSITORY / name, f"/app/{name}")
        lines += [f"cp -a /etc {root}/etc", f"mkdir {root}/dev {root}/proc"]
        lines.append(f"echo '{_USER}' >>{root}/etc/passwd")
        lines.append(f"mkdir -p {root}/etc/ssh/ssh_config.d")
        lines.append(f"printf '{_SSH_CONFIG}' >{root}/etc/ssh/ssh_config.d/warmstate.conf")
        for file in (place / "hosts", self._folder / "resolv.conf"):
            lines.append(f"mount -o bind,ro {file} {root}/etc/{file.name}")
        for device in _DEVICES:
            bind(f"/dev/{device}", f"/dev/{device}", "bind")
        lines.append(f"mount -t proc proc {root}/proc")
        for mount in container["volumeMounts"]:
            (volume,) = (each for each in spec["volumes"] if each["name"] == mount["name"])
            how = "bind,ro" if {"configMap", "secret"} & volume.keys() else "bind"
            bind(self._volume(place, volume, spec), mount["mountPath"], how)
        lines.append(f"mount -o remount,ro {root}")
        lines.append(f'chroot {root} setpriv "$@" &')
        lines.append("wait $!")
        return "\n".join(lines)

    def _volume(self, place: Path, volume: Mapping[str, Any], spec: Mapping) -> Path:
        """Returns the folder of a volume, which the pod's `fsGroup` may write."""
        group, mode = spec["securityContext"]["fsGroup"], 0o660
        if "emptyDir" in volume:
            folder = place / volume["name"]
            folder.mkdir()
        elif "persistentVolumeClaim" in volume:
            folder = self._claims[volume["persistentVolumeClaim"]["claimName"]]
        else:
            source = volume.get("configMap", {}).get("name") or volume["secret"]["secretName"]
            folder, mode = self._claims[source], 0o644
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, -1, group)
            path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else mode))
        return folder


class PaperKubelet(Kubelet):
    """Makes pods that run nothing."""

    def __init__(self) -> None:
        self.pods, self.events = [], queue.Queue()

    def run(self, manifest: dict[str, Any], index: int) -> Pod:
        """Returns a pod that runs until it is ended."""
        self.pods.append(Pod(manifest["metadata"]["name"], index, manifest))
        return self.pods[-1]

    def delete(self, pod: Pod, disruption: bool = False) -> None:
        """Ends the pod as the trainer ends after TERM."""
        pod.deleted, pod.disrupted = True, disruption
        self.end(pod, 143)

    def wait_until_ready(self, pod: Pod, timeout_seconds: float = 60) -> None:
        """Does nothing: pods on paper are ready."""

    def end(self, pod: Pod, exit_code: int) -> None:
        """Lets the pod's command end."""
        pod.exit_code = exit_code
        self.events.put((pod, None))


class Controller:
    """What makes pods: a queue of what its kubelet sees, and a condition at the end.

    Attributes:
        condition: Type and reason once the job has ended.
    """

    def __init__(self, kubelet: Kubelet):
        self.kubelet = kubelet
        self.condition: tuple[str, str] | None = None

    def note_end(self, pod: Pod) -> None:
        """Does what the controller does when a pod has ended."""
        raise NotImplementedError

    def delete(self, pod: Pod, disruption: bool = False) -> None:
        """Asks for the pod's end."""
        self.kubelet.delete(pod, disruption)

    def wait_for_line(self, pattern: str, timeout_seconds: float = 600) -> Pod:
        """Returns the pod that first prints a line with `pattern`, from now on."""
        limit = time.monotonic() + timeout_seconds
        while self.condition is None:
            pod, line = self._next_event(limit)
            if line is not None and re.search(pattern, line):
                return pod
        raise AssertionError(f"the job ended, {self.condition}:\n{self.log()}")

    def wait(self, timeout_seconds: float = 600) -> tuple[str, str]:
        """Returns the job's condition when it has ended."""
        self.wait_until(lambda: self.condition is not None, timeout_seconds)
        return self.condition

    def wait_until(self, is_true: Callable[[], bool], timeout_seconds: float = 600) -> None:
        """Handles what happens until something is true."""
        limit = time.monotonic() + timeout_seconds
        while not is_true():
            self._next_event(limit)

    def log(self) -> str:
        """Returns what all pods printed."""
        return "".join(
            f"[{pod.name}] {line}"
            for pod in self.kubelet.pods
            for line in [*pod.lines, f"exit code {pod.exit_code}\n"]
        )

    def _next_event(self, limit: float) -> tuple[Pod, str | None]:
        try:
            pod, line = self.kubelet.events.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"nothing happened in time:\n{self.log()}") from None
        if line is None:
            if pod.killer:
                pod.killer.cancel()
            self.note_end(pod)
        return pod, line


class IndexedJob(Controller):
    """A Job and its controller.

    Attributes:
        pods: All that were made for it, oldest first.
        counted: Failures that count against the limits; `podFailurePolicy` ignores some.
        pauses: Seconds that the controller would have waited before each pod that it made again.
    """

    def __init__(self, job: dict[str, Any], kubelet: Kubelet):
        super().__init__(kubelet)
        self.manifest, self._spec = job, job["spec"]
        self._names = itertools.count()
        self.pods: list[Pod] = []
        self.counted = 0
        self.pauses: list[float] = []
        self._counted_of_index: Counter[int] = Counter()
        self._failed_of_index: Counter[int] = Counter()  # also those that are ignored
        self._untracked: list[Pod] = []  # deleted because the Job was suspended: not counted
        self._verdict: tuple[str, str] | None = None  # the condition, once all pods have ended

    def start(self) -> None:
        """Makes the pods of all indexes that have not succeeded, unless the Job is suspended."""
        if not self._spec.get("suspend"):
            for index in range(self._spec.get("completions", 1)):
                if not self._has_succeeded(index):
                    self._make_pod(index)

    def suspend(self) -> None:
        """Deletes the pods that run, as the controller does once `suspend` is true."""
        self._spec["suspend"] = True
        for pod in self.pods:
            if pod.exit_code is None:
                self._untracked.append(pod)
                self.delete(pod)

    def resume(self) -> None:
        """Makes the pods once `suspend` is false; `podReplacementPolicy` waits for the old ones."""
        assert all(pod.exit_code is not None for pod in self.pods)
        self._spec["suspend"] = False
        self.start()

    def running(self, index: int) -> Pod:
        """Returns the pod that runs with this index."""
        (pod,) = (pod for pod in self.pods if pod.index == index and pod.exit_code is None)
        return pod

    def note_end(self, pod: Pod) -> None:
        if pod in self._untracked:
            return
        if self._verdict is None:
            self._judge(pod)
        if self._verdict is None:
            if pod.exit_code:
                self._failed_of_index[pod.index] += 1
                of_index, of_job = self._failed_of_index[pod.index], self._failed_of_index.total()
                self.pauses.append(backoff_seconds(self._spec, of_index, of_job))
                self._make_pod(pod.index)
            elif all(self._has_succeeded(i) for i in range(self._spec.get("completions", 1))):
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
        manifest = pod_manifest(self.manifest, index, f"{next(self._names):05d}")
        self.pods.append(self.kubelet.run(manifest, index))


@contextlib.contextmanager
def kubelet(
    claims: Mapping[str, Path], folder: Path, service: Mapping[str, Any] | None
) -> Iterator[Kubelet]:
    """Yields a kubelet in a network; ends all that it started.

    Args:
        claims: The folder that stands for each claim, by the claim's name.
        folder: What is not in a volume goes here.
    """
    programs = ("ip", "nsenter", "unshare", "setpriv")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and programs; missing: {', '.join(missing) or 'root'}")
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network().opened())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        made = Kubelet(claims, folder, network, service)
        stack.callback(made.close)
        yield made


@contextlib.contextmanager
def indexed_job(
    documents: Sequence[Mapping[str, Any]], claims: Mapping[str, Path], folder: Path
) -> Iterator[IndexedJob]:
    """Runs the Job among `documents`; the other arguments are those of `kubelet`."""
    by_kind = {document["kind"]: document for document in documents}
    with kubelet(claims, folder, by_kind.get("Service")) as node:
        job = IndexedJob(by_kind["Job"], node)
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
    labels = template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": name}
    metadata: dict[str, Any] = {"name": f"{name}-{suffix}", "labels": labels}
    spec = template["spec"]
    if job["spec"].get("completionMode") == "Indexed":
        own = {INDEX: str(index)}
        metadata = {"name": f"{name}-{index}-{suffix}", "labels": labels | own, "annotations": own}
        (container,) = spec["containers"]
        indexed = {"name": "JOB_COMPLETION_INDEX", "value": str(index)}
        container = container | {"env": [*container.get("env", []), indexed]}
        spec = spec | {"hostname": f"{name}-{index}", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def container_environment(
    pod: Mapping[str, Any], image_environment: Mapping[str, str]
) -> dict[str, str]:
    """Returns what the kubelet gives the pod's container, over what its image sets."""
    (container,) = pod["spec"]["containers"]
    values = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    for entry in container["env"]:
        if "valueFrom" not in entry:
            values[entry["name"]] = _expand(entry.get("value", ""), values)
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


def _container_process(pod: Pod, timeout_seconds: float = 30) -> int | None:
    """Returns the process of the pod's command as it is seen here; None if it has ended."""
    user = str(pod.spec["securityContext"]["runAsUser"])
    limit = time.monotonic() + timeout_seconds
    while pod.process.poll() is None and time.monotonic() < limit:
        for pause in _children(pod.process.pid):
            for child in _children(pause):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if f"\nUid:\t{user}\t" in Path(f"/proc/{child}/status").read_text():
                        return child
        time.sleep(0.02)  # until its file system is made
    return None


def _children(process: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # After the program's name, which may hold anything: state and parent.
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == process:
                yield int(folder.name)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
