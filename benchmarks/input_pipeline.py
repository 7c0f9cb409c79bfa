"""Times the way from the data to the batch against plain `tf.data` over TFDS, on one core.

All pipelines read the train split of imdb_reviews, use the same vocabulary and give batches of the
last MAX_TOKENS ids of BATCH reviews; that they see the same tokens is checked first. Turns are
interleaved, so that a noisy machine is noisy for all. Prints one table and writes one JSON:

    python -m benchmarks.input_pipeline --data_dir=DIR --out=benchmarks/results/input_pipeline.json

  tokens/s          in wall time, of real tokens: padding does not count
  tokens/CPU s      the same in this process's processor time, which other programs disturb less
  padding           the part of a batch's tokens that is padding
  waiting           the part of training's time spent in next(iterator), while a classifier
                    of UNITS cells trains on the same core; the worst case for a pipeline
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from benchmarks import machine
from data_pipelines.batches.batch_plan import BatchPlan
from data_pipelines.batches.dataset import make_dataset
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tokenizers.tokenizer import Tokenizer
from trainer.models.classifier import Classifier, losses_and_errors
from trainer.models.encoder import Encoder

BATCH, MAX_TOKENS, VOCAB_SIZE, UNITS = 64, 400, 10_000, 128
PREFETCH_BATCHES = 4
SHUFFLE_REVIEWS = 10_000
BUCKETS = [64, 96, 128, 160, 192, 224, 256, 320, 400]
OURS, CACHED = "warmstate", "map, cache in memory, padded_batch"


def make_store(folder: Path, data_dir: str) -> TokenStore:
    """Returns the store of the reviews in `data_dir`, made by `prepare`."""
    flags = ["--source=tfds:imdb_reviews", f"--data_dir={data_dir}", f"--out={folder}"]
    command = [sys.executable, "-m", "data_pipelines.prepare", *flags]
    subprocess.run([*command, f"--vocab_size={VOCAB_SIZE}"], check=True, stdout=subprocess.DEVNULL)
    return TokenStore(folder)


def reviews(data_dir: str) -> tf.data.Dataset:
    """Returns (text, label) of TFDS's train split, its files shuffled."""
    return tfds.load(
        "imdb_reviews",
        split="train",
        data_dir=data_dir,
        download=False,
        as_supervised=True,
        shuffle_files=True,
    )


def check_same_tokens(view: SplitView, tokenizer: Tokenizer, data_dir: str) -> None:
    """Raises AssertionError unless the store holds what the peers will read."""
    batches = reviews(data_dir).batch(256).map(lambda text, label: tokenizer.encode(text))
    lengths = np.sort(np.concatenate([ids.row_lengths().numpy() for ids in batches]))
    ours = np.sort(view.lengths_of(np.arange(len(view))))
    if not np.array_equal(lengths, ours):
        raise AssertionError(
            f"the store holds {len(ours):,} reviews of {ours.sum():,} tokens, "
            f"TFDS {len(lengths):,} of {lengths.sum():,}"
        )


def ours(view: SplitView) -> tf.data.Dataset:
    """Returns {"tokens", "lengths", "labels"} and more, over and over."""
    plan = BatchPlan(view, max_tokens=MAX_TOKENS, global_batch=BATCH, seed=0)
    one_process = {"first_shard": 0, "num_local_shards": 1, "num_shards": 1}
    return make_dataset(
        view,
        plan,
        start_step=0,
        stop_step=10**9,
        prefetch_batches=PREFETCH_BATCHES,
        **one_process,
    )


def peers(tokenizer: Tokenizer, data_dir: str) -> dict[str, tf.data.Dataset]:
    """Returns the pipelines to compare with; {"tokens", "lengths", "labels"}, over and over."""

    def of_text(text: tf.Tensor, label: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = tokenizer.encode(text[None])[0][-MAX_TOKENS:]
        return {"tokens": tokens, "lengths": tf.size(tokens), "labels": tf.cast(label, tf.int32)}

    def of_texts(texts: tf.Tensor, labels: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = tokenizer.encode(texts)[:, -MAX_TOKENS:]
        return {
            "tokens": tokens.to_tensor(),
            "lengths": tf.cast(tokens.row_lengths(), tf.int32),
            "labels": tf.cast(labels, tf.int32),
        }

    texts = reviews(data_dir).repeat().shuffle(SHUFFLE_REVIEWS)
    cached = reviews(data_dir).map(of_text, tf.data.AUTOTUNE).cache()
    datasets = {
        "map, padded_batch": texts.map(of_text, tf.data.AUTOTUNE).padded_batch(BATCH),
        "map, bucket_by_sequence_length": texts.map(
            of_text, tf.data.AUTOTUNE
        ).bucket_by_sequence_length(
            lambda element: element["lengths"], BUCKETS, [BATCH] * (len(BUCKETS) + 1)
        ),
        "batch, map": texts.batch(BATCH).map(of_texts, tf.data.AUTOTUNE),
        CACHED: cached.repeat().shuffle(SHUFFLE_REVIEWS).padded_batch(BATCH),
    }
    return {name: dataset.prefetch(PREFETCH_BATCHES) for name, dataset in datasets.items()}


def training_step(spec: dict[str, tf.TensorSpec]) -> Callable[[dict], tf.Tensor]:
    """Returns a compiled step of a classifier with Adam: batch -> loss."""
    classifier = Classifier(Encoder(VOCAB_SIZE, UNITS, UNITS, seed=0), num_classes=2)
    classifier.build()
    optimizer = keras.optimizers.Adam(1e-3)
    variables = classifier.trainable_variables
    optimizer.build(variables)

    @tf.function(input_signature=[spec])
    def step(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = classifier.logits(batch["tokens"], batch["lengths"], training=True)
            losses, _ = losses_and_errors(logits, batch["labels"])
            loss = tf.reduce_mean(losses)
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss

    return step


def read(iterator: Iterator[dict], seconds: float) -> dict[str, float]:
    """Reads batches for about `seconds`; returns the rates and the part that is padding."""
    batches = []
    began, cpu_began = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds or len(batches) < PREFETCH_BATCHES:
        batches.append(next(iterator))
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    tokens = sum(int(tf.reduce_sum(batch["lengths"])) for batch in batches)
    padded = sum(int(tf.size(batch["tokens"])) for batch in batches)
    return {
        "tokens_per_second": tokens / elapsed,
        "tokens_per_cpu_second": tokens / cpu,
        "padding_percent": 100 * (1 - tokens / padded),
    }


def train(
    iterator: Iterator[dict], step: Callable[[dict], tf.Tensor], steps: int
) -> dict[str, float]:
    """Trains; returns the part of the time spent waiting for batches, and a step's time."""
    for _ in range(PREFETCH_BATCHES + 1):
        next(iterator)  # what was prepared while other pipelines had their turn
    waited = computed = 0.0
    for _ in range(steps):
        began = time.perf_counter()
        batch = next(iterator)
        ready = time.perf_counter()
        step({name: batch[name] for name in ("tokens", "lengths", "labels")}).numpy()
        waited += ready - began
        computed += time.perf_counter() - ready
    return {
        "waiting_percent": 100 * waited / (waited + computed),
        "step_ms": 1e3 * computed / steps,
    }


def results(turns: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Returns a record a pipeline: medians over its turns, and how many times slower it is."""
    records = []
    for name, values in turns.items():
        medians = {
            key: round(statistics.median(turn[key] for turn in values), 2) for key in values[0]
        }
        ratios = [
            ours["tokens_per_second"] / turn["tokens_per_second"]
            for ours, turn in zip(turns[OURS], values, strict=True)
        ]
        record = {"name": name, **medians, "warmstate_is_faster_by": statistics.median(ratios)}
        record["warmstate_is_faster_by"] = round(record["warmstate_is_faster_by"], 1)
        records.append(record)
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    print("| pipeline | tokens/s | tokens/CPU s | ours is faster by | padding | waiting |")
    print("|---|---|---|---|---|---|")
    for r in records:
        print(
            f"| {r['name']} | {r['tokens_per_second']:,.0f} | {r['tokens_per_cpu_second']:,.0f} "
            f"| {r['warmstate_is_faster_by']} | {r['padding_percent']:.1f} % "
            f"| {r['waiting_percent']:.2f} % of {r['step_ms']:,.0f} ms |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR"))
    parser.add_argument("--out", default="benchmarks/results/input_pipeline.json")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds_per_turn", type=float, default=1.0)
    parser.add_argument("--steps_per_turn", type=int, default=8)
    args = parser.parse_args()
    if not args.data_dir:
        parser.error("--data_dir is not set: name a folder of prepared TFDS data sets")
    # Before TensorFlow counts the cores and starts its threads.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", args.data_dir)
        tokenizer = load_tokenizer(store.vocab_path, store.tokenizer_config)
        view = store.split(*(name for name in ("train", "validation") if name in store.splits))
        check_same_tokens(view, tokenizer, args.data_dir)
        datasets = {OURS: ours(view), **peers(tokenizer, args.data_dir)}
        spec = {k: datasets[OURS].element_spec[k] for k in ("tokens", "lengths", "labels")}
        step = training_step(spec)
        iterators = {name: iter(dataset) for name, dataset in datasets.items()}
        for iterator in iterators.values():  # fills the shuffle buffers
            step({name: next(iterator)[name] for name in spec})
        for _ in range(len(view) // BATCH):
            next(iterators[CACHED])
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in datasets}
        for _ in range(args.turns):
            for name, iterator in iterators.items():
                turns[name].append(read(iterator, args.seconds_per_turn))
            for name, iterator in iterators.items():
                turns[name][-1] |= train(iterator, step, args.steps_per_turn)

    records = results(turns)
    print_table(records)
    facts = {**machine.facts(), "tensorflow_datasets": tfds.__version__}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, "results": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
