"""Times `WarmLSTM` against `keras.layers.LSTM`, forward and backward, on this machine's CPU or GPU.

Both layers hold the same weights and are checked against each other first. Repetitions are
interleaved, so that a noisy machine is noisy for both. Prints one table and writes one JSON:

    python -m benchmarks.lstm_layer --out=benchmarks/results/lstm_layer.json
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.machine import facts
from trainer.models.lstm import WarmLSTM

# batch, time, inputs, units
SHAPES = [(64, 200, 256, 512), (64, 100, 256, 1024), (32, 100, 128, 256)]
GEMM_SIDE = 2048


def layer_step(layer: keras.layers.LSTM, inputs: tf.Tensor, mask: tf.Tensor | None) -> Callable:
    """Returns a compiled step: outputs, and the gradients of inputs and weights."""
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, mask=mask, training=True)
            loss = tf.reduce_sum(outputs * outputs)
        return [outputs, *tape.gradient(loss, [inputs, *weights])]

    return step


def steps_of(shape: tuple[int, int, int, int], masked: bool) -> dict[str, Callable]:
    """Returns the step of either layer on the same weights and inputs, after comparing them."""
    batch, steps, width, units = shape
    rng = np.random.default_rng(0)
    inputs = tf.constant(rng.normal(size=(batch, steps, width)), tf.float32)
    lengths = rng.integers(steps // 2, steps + 1, size=batch)
    mask = tf.sequence_mask(lengths, steps) if masked else None
    layers = {
        "keras": keras.layers.LSTM(units, return_sequences=True),
        "warmstate": WarmLSTM(units, return_sequences=True),
    }
    for layer in layers.values():
        layer.build(inputs.shape)
    layers["warmstate"].set_weights(layers["keras"].get_weights())
    functions = {name: layer_step(layer, inputs, mask) for name, layer in layers.items()}
    for ours, theirs in zip(functions["warmstate"](), functions["keras"](), strict=True):
        error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
        if error > 1e-5:
            raise AssertionError(f"{shape}: the layers differ by {error:.1e}")
    return functions


def seconds(function: Callable) -> float:
    """Returns the wall time of one call, in seconds."""
    start = time.perf_counter()
    tf.nest.map_structure(lambda tensor: tensor.numpy(), function()[-1])
    return time.perf_counter() - start


def measure(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Returns `repeats` wall times in seconds of each function, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def gemm() -> Callable:
    """Returns a compiled product of two square matrices: what this machine can do."""
    matrix = tf.random.stateless_normal((GEMM_SIDE, GEMM_SIDE), seed=(0, 0))
    return tf.function(lambda: [tf.matmul(matrix, matrix)])


def row(name: str, flops: float, times: dict[str, list[float]]) -> dict[str, Any]:
    """Returns a result: times in milliseconds and rates in GFLOP/s, minimum and median."""
    result: dict[str, Any] = {"name": name}
    for layer, values in times.items():
        for label, value in (("min", min(values)), ("median", statistics.median(values))):
            result[f"{layer}_{label}_ms"] = round(value * 1e3, 2)
            result[f"{layer}_{label}_gflops"] = round(flops / value / 1e9, 1)
    if "keras" in times:
        for label in ("min", "median"):
            ratio = result[f"keras_{label}_ms"] / result[f"warmstate_{label}_ms"]
            result[f"speedup_{label}"] = round(ratio, 2)
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    print("| forward + backward | Keras min (median) | ours min (median) | GFLOP/s | speed-up |")
    print("|---|---|---|---|---|")
    for r in results:
        if "speedup_min" not in r:
            print(f"| {r['name']} | | | {r['gemm_min_gflops']} ({r['gemm_median_gflops']}) | |")
            continue
        print(
            f"| {r['name']} | {r['keras_min_ms']} ms ({r['keras_median_ms']}) "
            f"| {r['warmstate_min_ms']} ms ({r['warmstate_median_ms']}) "
            f"| {r['keras_min_gflops']} -> {r['warmstate_min_gflops']} "
            f"| {r['speedup_min']} ({r['speedup_median']}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/lstm_layer.json")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    results = []
    for shape in SHAPES:
        batch, steps, width, units = shape
        # Forward and two gradients, each 2 * 4 * units * (width + units) a step and example.
        flops = 3 * 2 * 4 * units * (width + units) * batch * steps
        for masked in (False, True):
            name = f"batch {batch}, {steps} steps, {width} -> {units}"
            name += ", padded" if masked else ""
            results.append(row(name, flops, measure(steps_of(shape, masked), args.repeats)))
    times = measure({"gemm": gemm()}, args.repeats)
    results.append(row(f"product of {GEMM_SIDE} x {GEMM_SIDE}", 2 * GEMM_SIDE**3, times))

    print_table(results)
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    gpus = len(tf.config.list_physical_devices("GPU"))
    out.write_text(
        json.dumps({"machine": facts() | {"gpus": gpus}, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
