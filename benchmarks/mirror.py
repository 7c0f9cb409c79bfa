"""What --mirror costs for a checkpoint of 33 MB, and how soon it has caught up after an outage.

    PYTHONPATH=.venv-s3 python -m benchmarks.mirror      # after make test-s3

Processor time of the uploading process: of the thread that hashes and uploads, and the driver's.
"""

import os
import queue
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipelines.durable import discard, write_folder
from tests.s3_server import s3_server
from trainer.mirror import Mirror

CHECKPOINT_BYTES = 33_000_000
OUTAGE_SECONDS = 60.0


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


def main() -> None:
    """Measures, and prints."""
    with tempfile.TemporaryDirectory() as place, s3_server() as server:
        os.environ.update(server.environment)
        for url in (f"file://{place}/store", "s3://bucket/costs"):
            folder = Path(place) / url[:2]
            mirror = Mirror(url, folder, print)
            milliseconds = []
            for step in range(1, 8):
                write_step(folder, step)
                began = time.process_time()
                mirror._upload()  # what its thread does
                milliseconds.append(1000 * (time.process_time() - began))
            print(f"{url[:2]}: {np.median(milliseconds[1:]):.0f} ms of CPU for a checkpoint")
        lines: queue.Queue[str] = queue.Queue()
        folder, step = Path(place) / "outage", 1
        mirror = Mirror("s3://bucket/outage", folder, lines.put)
        mirror.start(is_new=True)
        server.fail("cut")
        began = time.monotonic()
        while time.monotonic() - began < OUTAGE_SECONDS:
            write_step(folder, step)
            mirror.changed()
            step += 1
            time.sleep(3)
        server.work()
        began = time.monotonic()
        while "up to date again" not in lines.get(timeout=300):
            pass
        print(f"{time.monotonic() - began:.1f} s after the store's return all is there")


if __name__ == "__main__":
    main()
