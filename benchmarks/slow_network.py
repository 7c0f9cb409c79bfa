"""Measures what a slow network adds to a training step of two workers, beside the prediction.

    python -m benchmarks.slow_network     (as root; needs the program `ip`)

Two workers of tf.distribute run in two network namespaces. Each packet between them passes through
this process, which hands it on late and no faster than a rate. (Not every kernel has `netem`.)
The prediction: every hop of a collective takes two delays, as TensorFlow asks for each buffer and
then gets it, and the bytes take their time at the rate. The first collective, of the loss and the
numbers of rows, has one hop; the backward pass, half of a step, runs beside it.
"""

import argparse
import contextlib
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import facts
from benchmarks.processes import markdown_table

ADDRESSES = ("10.213.9.1", "10.213.9.2")
PORT = 20_000  # free: each namespace is new
MTU = 65_000  # few packets: each costs this process some microseconds
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
VOCAB_SIZE = 30_000
HOPS = {"dense": 2, "rows": 1}  # of two workers' gradients: a sum has two, a gather one
OUT = Path("benchmarks/results/slow_network.json")


class Network(NamedTuple):
    """A cable: seconds from end to end, and bits a second in each direction."""

    delay_seconds: float
    bits_per_second: float


NETWORKS = (
    Network(0.0, float("inf")),
    Network(1e-4, float("inf")),
    Network(1e-3, float("inf")),
    Network(1e-2, float("inf")),
    Network(0.0, 1e10),
    Network(0.0, 1e9),
    Network(1e-3, 1e9),
)


class Cable:
    """Hands packets from each of two devices to the other, late."""

    def __init__(self, network: Network, devices: tuple[int, int]):
        self._network = network
        self._devices = devices
        self._on_the_way: dict[int, deque[tuple[float, bytes]]] = {fd: deque() for fd in devices}
        self._free_at = dict.fromkeys(devices, 0.0)
        self._stopped, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        os.write(self._stop, b"x")
        self._thread.join()
        os.close(self._stop)
        os.close(self._stopped)

    def _run(self) -> None:
        first, second = self._devices
        while True:
            due = [packets[0][0] for packets in self._on_the_way.values() if packets]
            wait = max(0.0, min(due) - time.monotonic()) if due else None
            ready, _, _ = select.select([*self._devices, self._stopped], [], [], wait)
            if self._stopped in ready:
                return
            for source, sink in ((first, second), (second, first)):
                if source in ready:
                    self._take(source)
                packets = self._on_the_way[source]
                while packets and packets[0][0] <= time.monotonic():
                    os.write(sink, packets.popleft()[1])

    def _take(self, source: int) -> None:
        packet = os.read(source, MTU + 64)
        begins = max(time.monotonic(), self._free_at[source])
        self._free_at[source] = begins + 8 * len(packet) / self._network.bits_per_second
        due = self._free_at[source] + self._network.delay_seconds
        self._on_the_way[source].append((due, packet))


def ip(*words: str) -> None:
    """Runs `ip`; raises CalledProcessError if it fails."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def two_hosts(network: Network) -> Iterator[list[str]]:
    """Yields the names of two network namespaces that a cable joins."""
    names = [f"warm{os.getpid()}{end}" for end in "ab"]
    with contextlib.ExitStack() as stack:
        devices = []
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            device = os.open("/dev/net/tun", os.O_RDWR)
            stack.callback(os.close, device)
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "mtu", str(MTU), "up")
            ip("-n", name, "link", "set", "lo", "up")
            devices.append(device)
        cable = Cable(network, (devices[0], devices[1]))
        stack.callback(cable.close)
        yield names


def gang(network: Network, repeats: int) -> dict[str, dict[str, Any]]:
    """Returns what `benchmarks.allreduce` measured on two hosts, by kind of reduction."""
    cluster = {"worker": [f"{address}:{PORT}" for address in ADDRESSES]}
    with two_hosts(network) as hosts, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        program = [sys.executable, "-m", "benchmarks.allreduce", "--worker=multi_worker"]
        program += [f"--vocab_size={VOCAB_SIZE}", f"--repeats={repeats}", f"--out={out}"]
        workers = []
        for index, host in enumerate(hosts):
            config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            one_thread = {"TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1"}
            environment = os.environ | one_thread | {"TF_CONFIG": json.dumps(config)}
            workers.append(
                subprocess.Popen(["ip", "netns", "exec", host, *program], env=environment)
            )
        codes = [worker.wait() for worker in workers]
        if any(codes):
            sys.exit(f"the workers ended with {codes}")
        return {record["reduction"]: record for record in json.loads(out.read_text())}


def rows_of(network: Network, found: dict, undelayed: dict) -> list[dict[str, Any]]:
    """Returns measured and predicted milliseconds of a step for each kind of reduction."""
    rows = []
    for reduction, hops in HOPS.items():
        sent = 1e6 * found[reduction]["megabytes_sent"]
        alone = found["alone" if reduction == "dense" else "rows alone"]["step_ms_median"]
        first = max(0.0, 2 * network.delay_seconds - alone / 2e3)
        added = first + 2 * hops * network.delay_seconds + 8 * sent / network.bits_per_second
        predicted = undelayed[reduction]["step_ms_median"] + 1e3 * added
        measured = found[reduction]["step_ms_median"]
        rate = network.bits_per_second
        rows.append(
            {
                "delay, ms": 1e3 * network.delay_seconds,
                "Gbit/s": "" if rate == float("inf") else f"{rate / 1e9:g}",
                "reduction": reduction,
                "MB sent": round(sent / 1e6, 2),
                "alone, ms": alone,
                "step, ms": measured,
                "predicted, ms": round(predicted, 2),
                "measured / predicted": round(measured / predicted, 2),
            }
        )
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    undelayed: dict[str, dict[str, Any]] = {}
    for network in NETWORKS:
        found = gang(network, options.repeats)
        undelayed = undelayed or found
        rows += rows_of(network, found, undelayed)
        print(rows[-2:], flush=True)
    options.out.write_text(json.dumps({"machine": facts(), "rows": rows}, indent=1) + "\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
