"""What a step waits for, if the store stays at a slow web server: --store_cache_bytes.

    python -m benchmarks.remote_store --out=benchmarks/results/remote_store.json

Pretrains on 25,000 movie reviews with the store on this disk, and at a server in another process
that answers each request late and sends slowly: with the batches that the product reads ahead, and
with one at a time. The bits must be those of the local run. Also the processor time of reading a
document, by driver; s3:// needs `make test-s3` first, and PYTHONPATH=.venv-s3.
"""

import argparse
import contextlib
import http.server
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import facts
from data_pipelines.batches.dataset import REMOTE_BATCHES
from data_pipelines.store.remote_tokens import RemoteTokens
from data_pipelines.store.token_store import TokenStore
from tests.s3_server import s3_server

STEPS, BATCH = 60, 32
FLAGS = (
    "--stage=pretrain", f"--pretrain_steps={STEPS}", f"--pretrain_batch_size={BATCH}",
    "--units=128", "--embedding_dim=64", "--pretrain_max_tokens=100",
    "--pretrain_evaluate_documents=32", "--mean_state_documents=32", "--vocab_size=20000",
)  # fmt: skip
TRAINER = """
import sys
from absl import app
from data_pipelines import flag_fields
from data_pipelines.batches import dataset
from trainer import main
from trainer.config import Config
from trainer.training.progress import Progress
dataset.REMOTE_BATCHES, times = int(sys.argv.pop(1)), open(sys.argv.pop(1), "w")
count = Progress.count
def counted(self, step, outcome, seconds, wait_seconds):
    print(seconds or 0, wait_seconds, file=times, flush=True)
    count(self, step, outcome, seconds, wait_seconds)
Progress.count = counted
flag_fields.define([Config])
app.run(main.main, flags_parser=main.parse_flags)
"""


class SlowHandler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files late and slowly."""

    protocol_version = "HTTP/1.1"
    delay_seconds, bytes_per_second = 0.0, 0.0
    sending = threading.Lock()  # the line is one for all

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        start, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(start) : int(last or len(data)) + 1]
        time.sleep(self.delay_seconds)
        if self.bytes_per_second:
            with self.sending:
                time.sleep(len(part) / self.bytes_per_second)
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class SlowServer(http.server.ThreadingHTTPServer):
    """Lets all connections in that are opened at once; by default 5 may wait, the others retry."""

    request_queue_size = 1024


def serve(folder: str, delay_seconds: float, bytes_per_second: float) -> None:
    """Serves a folder, and prints the port."""
    SlowHandler.delay_seconds, SlowHandler.bytes_per_second = delay_seconds, bytes_per_second
    os.chdir(folder)
    server = SlowServer(("127.0.0.1", 0), SlowHandler)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextlib.contextmanager
def slow_server(folder: Path, delay_seconds: float, bytes_per_second: float) -> Iterator[str]:
    """Yields the address of a slow server in another process."""
    command = [sys.executable, "-m", "benchmarks.remote_store", f"--serve={folder}"]
    command += [f"--delay_seconds={delay_seconds}", f"--bytes_per_second={bytes_per_second}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def step_times(folder: Path, ahead: int, *flags: str) -> np.ndarray:
    """Trains in `folder`; returns each step's time and its wait before, in ms: [steps, 2]."""
    times = folder.with_suffix(".times")
    words = [sys.executable, "-c", TRAINER, str(ahead), str(times), f"--run_dir={folder}", *flags]
    cache = {"XDG_CACHE_HOME": str(folder.with_suffix(".cache"))}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ | cache)
    return 1000 * np.loadtxt(times)


def trained(folder: Path, store: str, ahead: int, *flags: str) -> dict[str, Any]:
    """Trains; returns what the steps took and waited, without the first five, and the encoder."""
    taken, waits = step_times(folder, ahead, *FLAGS, f"--store={store}", *flags)[5:].T
    return {
        "step_ms": round(np.median(taken)),
        "wait_ms_median": round(np.median(waits), 1),
        "wait_ms_longest": round(waits.max(), 1),
        "encoder": (folder / "encoder" / "encoder.safetensors").read_bytes(),
    }


def cost(url: str, store: TokenStore) -> float:
    """Returns the processor time of reading a document of a random batch, in milliseconds."""
    view = store.split("train")
    far = RemoteTokens(url, np.dtype("<u2"), store.vocab_size, print)
    batches = np.random.default_rng(0).permutation(len(view))[: 20 * BATCH].reshape(20, BATCH)
    entries = store.manifest["splits"]["train"]["shards"]
    firsts = np.cumsum([0, *(entry["examples"] for entry in entries)])
    times = []
    for documents in batches:
        located = view.located(documents)
        shards = np.searchsorted(firsts, documents, side="right") - 1
        names = (entries[shard]["name"] for shard in shards)
        ranges = list(zip(names, located.start.tolist(), located.stop.tolist(), strict=True))
        began = time.process_time()
        far.read(ranges)
        times.append((time.process_time() - began) / BATCH)
    return round(1000 * statistics.median(times), 2)


def measure(place: Path, delay_seconds: float, bytes_per_second: float) -> dict[str, Any]:
    """Returns all figures."""
    folder = place / "store"
    prepare = [sys.executable, "-m", "data_pipelines.prepare", "--source=movie_reviews"]
    subprocess.run([*prepare, f"--out={folder}", "--processes=1"], check=True)
    store, costs = TokenStore(folder), {}
    few = sum(p.stat().st_size for p in folder.iterdir() if p.suffix not in (".tokens", ".json"))
    bound = f"--store_cache_bytes={few}"
    found = {"disk": trained(place / "disk", str(folder), 1)}
    with slow_server(folder, delay_seconds, bytes_per_second) as url:
        for ahead in (REMOTE_BATCHES, 1):
            found[f"server, {ahead} at once"] = trained(place / f"at{ahead}", url, ahead, bound)
    with slow_server(folder, 0, 0) as url:
        costs["http"] = cost(url, store)
    with contextlib.suppress(ImportError), s3_server() as server:
        os.environ.update(server.environment)
        for path in folder.iterdir():
            server.client().upload_file(str(path), "bucket", f"store/{path.name}")
        costs["s3"] = cost("s3://bucket/store", store)
    encoders = [way.pop("encoder") for way in found.values()]
    if len(set(encoders)) > 1:
        raise AssertionError("the encoders differ")
    return {"runs": found, "milliseconds_of_cpu_per_document": costs}


def main() -> None:
    """Measures, prints, and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/remote_store.json")
    parser.add_argument("--delay_seconds", type=float, default=0.2, help="before each answer")
    parser.add_argument("--bytes_per_second", type=float, default=2e6, help="of all answers")
    parser.add_argument("--serve", help="folder; used by the program itself")
    options = parser.parse_args()
    slow = {"delay_seconds": options.delay_seconds, "bytes_per_second": options.bytes_per_second}
    if options.serve:
        return serve(options.serve, **slow)
    with tempfile.TemporaryDirectory() as place:
        result = {"machine": facts(), "server": slow, "batch": BATCH, "steps": STEPS}
        result |= measure(Path(place), **slow)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
