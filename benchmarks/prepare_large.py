"""Peak memory and speed of `prepare` on text that is larger than it: Parquet or CSV of any size.

    python -m benchmarks.prepare_large --data_dir=DIR --gigabytes=1,5 --formats=parquet,csv
    PYTHONPATH=.venv-spark python -m benchmarks.prepare_large ... -- --runner=spark

Writes IMDB's reviews again and again. In every copy but the first one word of a hundred gets the
copy's number, so that the number of distinct words grows, as it does in real text. Memory is the
proportional set size of `prepare` and all its processes together, sampled. Needs room on the disk
for the text and as much again, in --folder.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import facts
from benchmarks.processes import descendants_megabytes

ROWS = 5_000  # in a row group
SAMPLE_SECONDS = 0.5
NEW_WORDS = 0.01


def reviews(data_dir: str) -> list[tuple[str, int]]:
    """Returns IMDB's unlabelled reviews and half as many labelled ones, with labels."""
    from data_pipelines.sources import Example, open_source

    source = open_source("tfds:imdb_reviews", data_dir)
    splits = [(split, part) for split in source.splits for part in source.parts(split)]
    examples = (e for split, part in splits for e in source.examples(split, part))
    return [(e.text, max(e.label or 0, 0)) for e in examples if isinstance(e, Example)]


def copies(data_dir: str, size: float) -> Iterator[list[tuple[str, int]]]:
    """Yields `ROWS` documents at a time until their text has `size` bytes."""
    first, rng, written, copy = reviews(data_dir), np.random.default_rng(0), 0, 0
    while True:
        for start in range(0, len(first), ROWS):
            rows = first[start : start + ROWS]
            if copy:
                rows = [(changed(text, copy, rng), label) for text, label in rows]
            yield rows
            written += sum(len(text.encode()) for text, _ in rows)
            if written >= size:
                return
        copy += 1


def changed(text: str, copy: int, rng: np.random.Generator) -> str:
    """Returns the text with some words that no other copy has."""
    words = text.split(" ")
    for place in rng.integers(0, len(words), rng.binomial(len(words), NEW_WORDS)):
        words[place] = re.sub(r"\W", "", words[place]) + f"x{copy}"
    return " ".join(words)


def write(path: Path, data_dir: str, size: float) -> None:
    """Writes a file of the format that its ending names."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for rows in copies(data_dir, size):
                writer.writerows(rows)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string()), ("label", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in copies(data_dir, size):
            texts, labels = zip(*rows, strict=True)
            writer.write_table(pa.table({"text": texts, "label": labels}, schema=schema))


def note_cpu_seconds(cpu_seconds: dict[int, float]) -> None:
    """Notes the CPU seconds so far of the processes that this one started, and they started."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            cpu_seconds[process.pid] = times.user + times.system


def prepared(source: str, store: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Prepares a store; returns peak memory, seconds and sizes."""
    command = [sys.executable, "-m", "data_pipelines.prepare", f"--source={source}"]
    command += [f"--out={store}", *flags]
    began, peak, cpu_seconds = time.monotonic(), 0.0, {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, descendants_megabytes(os.getpid()))
        note_cpu_seconds(cpu_seconds)
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"prepare ended with {process.returncode}")
    seconds = time.monotonic() - began
    manifest = json.loads((store / "manifest.json").read_bytes())
    splits = manifest["splits"].values()
    return {
        "peak_mb": round(peak * 2**20 / 1e6),
        "processes": len(cpu_seconds),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(cpu_seconds.values()), 1),
        "documents": sum(split["examples"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
        "shards": sum(len(split["shards"]) for split in splits),
    }


def main() -> None:
    """Measures each size of each format, prints, and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/prepare_large.json")
    parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR"))
    parser.add_argument("--gigabytes", default="1,5", help="of text")
    parser.add_argument("--formats", default="parquet,csv")
    parser.add_argument("flags", nargs="*", help="of prepare, after --")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for text and stores")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # text needs no GPU
    out, runs = Path(options.out), []
    for kind in options.formats.split(","):
        for gigabytes in map(float, options.gigabytes.split(",")):
            with tempfile.TemporaryDirectory(dir=options.folder) as place:
                path = Path(place, f"texts.{kind}")
                write(path, options.data_dir, 1e9 * gigabytes)
                found = prepared(f"{kind}:{path}", Path(place, "store"), options.flags)
                run = {
                    "format": kind,
                    "text_gb": gigabytes,
                    "flags": options.flags,
                    "file_bytes": path.stat().st_size,
                }
                runs.append(run | found)
                runs[-1]["mb_per_cpu_second"] = round(1e3 * gigabytes / found["cpu_seconds"], 2)
                print(json.dumps(runs[-1]), flush=True)
            out.write_text(json.dumps({"machine": facts(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
