"""Times `prepare` against `keras.layers.TextVectorization`: adapt, and a map over the same data.

Both turn the same IMDB reviews into ids of a vocabulary of the same size; each run is a process of
its own, from its start to its end, and the two alternate, so that a noisy machine is noisy for
both. Ours also writes the store, with checksums. Their rules differ (ours keeps punctuation, and
apostrophes within words), so of the ids only this is checked: both have as many documents, and ours
are those that `WordTokenizer.encode` gives. Prints one table and writes one JSON:

    python -m benchmarks.prepare --data_dir=DIR --out=benchmarks/results/prepare.json
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.machine import facts

VOCAB_SIZE = 20_000
SOURCE = "tfds:imdb_reviews"


def vectorize(data_dir: str) -> dict[str, float]:
    """Adapts TextVectorization to train and unlabelled text, then maps it over all text.

    Returns:
        Seconds of adapt and of the map, and how many documents and tokens came out.
    """
    from data_pipelines.quiet_tensorflow import import_quietly

    import_quietly()
    import keras
    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder = pathlib.Path(data_dir) / "imdb_reviews" / "plain_text" / "1.0.0"
    builder = tfds.builder_from_directory(folder)

    def texts(*splits: str) -> tf.data.Dataset:
        data = builder.as_dataset(split="+".join(splits), shuffle_files=False)
        return data.map(lambda example: example["text"]).batch(512)

    layer = keras.layers.TextVectorization(max_tokens=VOCAB_SIZE, ragged=True)
    start = time.perf_counter()
    layer.adapt(texts("train", "unsupervised").prefetch(tf.data.AUTOTUNE))
    adapted = time.perf_counter()
    documents = tokens = 0
    everything = texts("train", "test", "unsupervised")
    for ids in everything.map(layer, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2):
        documents += int(ids.nrows())
        tokens += int(ids.flat_values.shape[0])
    mapped = time.perf_counter()
    return {
        "adapt_seconds": adapted - start,
        "map_seconds": mapped - adapted,
        "documents": documents,
        "tokens": tokens,
    }


def run_keras(data_dir: str) -> dict[str, Any]:
    """Returns what `vectorize` does, and the seconds of its whole process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.prepare", "--vectorize", f"--data_dir={data_dir}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {
        "command_seconds": time.perf_counter() - start,
        **json.loads(output.splitlines()[-1]),
    }


def run_prepare(data_dir: str, store: pathlib.Path) -> dict[str, Any]:
    """Returns the seconds of the command, and of these those after it had started."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "data_pipelines.prepare", f"--source={SOURCE}"]
    command += [f"--data_dir={data_dir}", f"--out={store}", f"--vocab_size={VOCAB_SIZE}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - start
    own = float(output.splitlines()[-1].rsplit(" after ", 1)[1].removesuffix(" s"))
    splits = json.loads((store / "manifest.json").read_text())["splits"].values()
    return {
        "command_seconds": seconds,
        "own_seconds": own,
        "documents": sum(split["examples"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
    }


def check(data_dir: str, folder: pathlib.Path, every: int = 50) -> int:
    """Compares stored ids with the tokenizer's own; returns how many documents were compared."""
    import numpy as np
    import tensorflow as tf

    from data_pipelines.sources import Example, open_source
    from data_pipelines.store.token_store import TokenStore
    from data_pipelines.tokenizers import load_tokenizer

    store, source = TokenStore(folder), open_source(SOURCE, data_dir)
    tokenizer = load_tokenizer(store.vocab_path, store.tokenizer_config)
    view = store.split("test")
    examples = [e for part in source.parts("test") for e in source.examples("test", part)]
    some = np.arange(0, len(view), every)
    texts = [example.text for example in examples if isinstance(example, Example)]
    expected = tokenizer.encode(tf.constant([texts[i] for i in some])).to_tensor(0).numpy()
    tokens, _ = view.gather(some, max_tokens=expected.shape[1])
    np.testing.assert_array_equal(tokens, expected)
    return len(some)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the median of each figure and the minimum of the times."""
    medians = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
    least = {
        f"{key}_min": round(min(run[key] for run in runs), 2)
        for key in runs[0]
        if key.endswith("_seconds")
    }
    return {**medians, **least}


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print("| 100,000 IMDB reviews -> ids | whole command, s, median (min) | without start-up, s |")
    print("|---|---|---|")
    for name, r in results.items():
        inside = r.get("own_seconds", r.get("adapt_seconds", 0) + r.get("map_seconds", 0))
        print(f"| {name} | {r['command_seconds']} ({r['command_seconds_min']}) | {inside:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/prepare.json")
    parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vectorize", action="store_true", help="one run of Keras's way")
    args = parser.parse_args()
    if not args.data_dir:
        parser.error("--data_dir (or TFDS_DATA_DIR) is required: it holds imdb_reviews")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # text needs no GPU
    if args.vectorize:
        print(json.dumps(vectorize(args.data_dir)))
        return

    compared = 0
    runs: dict[str, list] = {"TextVectorization": [], "prepare": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            store = pathlib.Path(folder) / "store"
            runs["TextVectorization"].append(run_keras(args.data_dir))
            runs["prepare"].append(run_prepare(args.data_dir, store))
            compared = compared or check(args.data_dir, store)
    results = {name: summary(values) for name, values in runs.items()}
    if results["TextVectorization"]["documents"] != results["prepare"]["documents"]:
        raise AssertionError(f"not the same documents: {results}")
    ratio = statistics.median(
        theirs["command_seconds"] / ours["command_seconds"]
        for theirs, ours in zip(runs["TextVectorization"], runs["prepare"], strict=True)
    )
    print_table(results)
    print(f"prepare is {ratio:.1f} times faster (median of ratios of neighbouring runs)")
    content = {
        "machine": facts(),
        "results": results,
        "runs": runs,
        "speedup_median": round(ratio, 2),
        "documents_compared": compared,
    }
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
