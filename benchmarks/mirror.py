"""What --mirror costs for a checkpoint of 33 MB, and how soon it has caught up after an outage.

    PYTHONPATH=.venv-s3 python -m benchmarks.mirror --out=benchmarks/results/mirror.json

after make test-s3. The server is moto's, in another process of the same machine. Processor time of
an upload is that of the thread that hashes and uploads, and of the driver's. Blocks of steps with
and without an upload beside them take turns, as in benchmarks/checkpoint.py.
"""

import argparse
import json
import os
import queue
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import facts
from data_pipelines.durable import discard, write_folder
from tests.s3_server import s3_server
from trainer.mirror import Mirror

CHECKPOINT_BYTES = 33_000_000
OUTAGE_SECONDS = 60.0
BLOCK_STEPS = 16


def write_step(folder: Path, step: int) -> None:
    """Writes a checkpoint of random bytes, and removes all but the last two."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    checkpoints = folder / "checkpoints"
    data = np.random.default_rng(step).bytes(CHECKPOINT_BYTES)
    files = {"state.safetensors": data, "state.json": b"{}"}
    write_folder(checkpoints / "unfinished", checkpoints / f"step-{step:08d}", files)
    for old in sorted(checkpoints.glob("step-*"))[:-2]:
        discard(old)


def upload_milliseconds(url: str, folder: Path) -> float:
    """Returns the processor time of the upload of a checkpoint."""
    mirror, milliseconds = Mirror(url, folder, print), []
    for step in range(1, 8):
        write_step(folder, step)
        began = time.process_time()
        mirror._upload()  # what its thread does
        milliseconds.append(1000 * (time.process_time() - began))
    return float(np.median(milliseconds[1:]))


def steps_beside(url: str, folder: Path, blocks: int) -> dict[str, Any]:
    """Returns what steps take, and how much longer while an upload runs: medians of blocks."""
    from benchmarks.checkpoint import batches, make_step

    run, _ = make_step(folder)
    stream = iter(batches(0, (2 * blocks + 1) * BLOCK_STEPS))
    mirror, times, uploads = Mirror(url, folder, print), ([], []), []
    for _ in range(BLOCK_STEPS):
        run(next(stream))

    def upload() -> None:
        began = time.perf_counter()
        mirror._upload()
        uploads.append(time.perf_counter() - began)

    for block in range(2 * blocks):
        thread = threading.Thread(target=upload)
        write_step(folder, block + 1)
        if block % 2:
            thread.start()
        taken = []
        for _ in range(BLOCK_STEPS):
            began = time.perf_counter(), time.process_time()
            run(next(stream))
            taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        if block % 2:
            thread.join()
        times[block % 2].append(taken)
    without, beside = (np.median(found, axis=0) for found in times)  # [steps, (wall, CPU)]
    step = np.median(without, axis=0)
    return {
        "step_ms": round(1000 * step[0], 1),
        "step_cpu_ms": round(1000 * step[1], 1),
        "upload_seconds": round(float(np.median(uploads)), 2),
        "delay_percent_by_step": (100 * (beside[:, 0] / step[0] - 1)).round(1).tolist(),
        "cpu_percent_by_step": (100 * (beside[:, 1] / step[1] - 1)).round(1).tolist(),
        "delay_ms_of_an_upload": round(1000 * float(np.sum(beside[:, 0] - without[:, 0])), 1),
        "cpu_ms_of_an_upload": round(1000 * float(np.sum(beside[:, 1] - without[:, 1])), 1),
    }


def seconds_to_catch_up(server: Any, folder: Path) -> tuple[float, int]:
    """Returns the seconds until all is there after an outage, and the checkpoints during it."""
    lines: queue.Queue[str] = queue.Queue()
    mirror = Mirror("s3://bucket/outage", folder, lines.put)
    mirror.start(is_new=True)
    server.fail("cut")
    began, step = time.monotonic(), 0
    while time.monotonic() - began < OUTAGE_SECONDS:
        step += 1
        write_step(folder, step)
        mirror.changed()
        time.sleep(3)
    server.work()
    began = time.monotonic()
    while "up to date again" not in lines.get(timeout=300):
        pass
    return round(time.monotonic() - began, 1), step


def main() -> None:
    """Measures, prints, and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20, help="of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": facts(), "checkpoint_bytes": CHECKPOINT_BYTES}
    with tempfile.TemporaryDirectory() as name, s3_server() as server:
        place = Path(name)
        os.environ.update(server.environment)
        for url in (f"file://{place}/store", "s3://bucket/costs"):
            result[f"upload_cpu_ms_{url[:2]}"] = upload_milliseconds(url, place / url[:2])
        result["steps"] = steps_beside("s3://bucket/steps", place / "steps", options.blocks)
        seconds, written = seconds_to_catch_up(server, place / "outage")
        result |= {"outage_checkpoints": written, "seconds_to_catch_up": seconds}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
