"""Times `WarmLSTM` against Keras's LSTM, TensorFlow's BlockLSTM and PyTorch's LSTM.

All hold the same weights and are checked against each other first: outputs, and gradients of
inputs and weights. They are run in turn, so that a noisy machine is noisy for all. Prints a table
and writes benchmarks/results/lstm_layer.json:

    python -m benchmarks.lstm_layer

`limit` is the time in which this machine could do it: the recurrent products at the rate of the
bare [4 units, units] x [units, batch] product, all others at a large one's, and nothing else.
On a GPU, Keras (cuDNN) is there to compare with, and PyTorch if .venv-bench has one for CUDA.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.machine import facts_with_gpu
from benchmarks.processes import (
    TORCH_PYTHON,
    Program,
    in_turn,
    min_and_median,
    torch_is_there,
    write_results,
)
from trainer import native
from trainer.models.lstm import WarmLSTM

# batch, steps, inputs, units, repetitions
SHAPES = [(64, 200, 256, 512, 11), (32, 400, 512, 1024, 5), (32, 100, 128, 256, 31)]
GEMM_SIDE = 2048
PRODUCTS = 50
TOLERANCE = 1e-5
HALF = "warmstate bfloat16"
HALF_TOLERANCE = 0.02


def layer_step(layer: keras.layers.LSTM, inputs: tf.Tensor, mask: tf.Tensor | None) -> Callable:
    """Returns a compiled step: outputs, and the gradients of inputs and weights."""
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, mask=mask, training=True)
            loss = tf.reduce_sum(tf.cast(outputs * outputs, tf.float32))
        return [outputs, *tape.gradient(loss, [inputs, *weights])]

    return step


def block_lstm_step(layer: keras.layers.LSTM, inputs: tf.Tensor) -> Callable:
    """Returns the same of TensorFlow's BlockLSTM, with the weights of `layer`."""
    kernel, recurrent, bias = (variable.value for variable in layer.trainable_variables)
    batch, steps, _ = inputs.shape
    zeros = tf.zeros([batch, layer.units])
    peephole = tf.zeros([layer.units])

    def reordered(weights: tf.Tensor) -> tf.Tensor:  # its gates: input, candidate, forget, output
        i, f, g, o = tf.split(weights, 4, -1)
        return tf.concat([i, g, f, o], -1)

    @tf.function
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.raw_ops.BlockLSTM(
                seq_len_max=tf.constant(steps, tf.int64),
                x=tf.transpose(inputs, (1, 0, 2)),
                cs_prev=zeros,
                h_prev=zeros,
                w=reordered(tf.concat([kernel, recurrent], 0)),
                wci=peephole,
                wcf=peephole,
                wco=peephole,
                forget_bias=0.0,
                cell_clip=-1.0,
                b=reordered(bias),
            ).h
            loss = tf.reduce_sum(outputs * outputs)
        gradients = tape.gradient(loss, [inputs, kernel, recurrent, bias])
        return [tf.transpose(outputs, (1, 0, 2)), *gradients]

    return step


def inference(layer: keras.layers.LSTM, inputs: tf.Tensor) -> Callable:
    """Returns a compiled call that keeps nothing for a backward pass."""
    return tf.function(lambda: [layer(inputs, training=False)])


def products(rows: int, inner: int, columns: int, count: int) -> Callable:
    """Returns `count` products one after the other, of one matrix and another each time."""
    left = tf.random.stateless_normal((rows, inner), (0, 0))
    right = tf.random.stateless_normal((8, inner, columns), (0, 1))

    @tf.function
    def run() -> list[tf.Tensor]:
        last = tf.zeros([rows, columns])
        for i in tf.range(count):
            last = tf.matmul(left, right[i % 8])
        return [last]

    return run


def seconds(function: Callable) -> float:
    """Returns the wall time of one call, in seconds."""
    start = time.perf_counter()
    tf.nest.map_structure(lambda tensor: tensor.numpy(), function()[-1])
    return time.perf_counter() - start


def check(
    name: str, found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = TOLERANCE
) -> None:
    """Raises AssertionError unless `found` are `expected` up to rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        error = np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs))
        if not error < tolerance:
            raise AssertionError(f"{name} differs from Keras by {error:.1e}")


def functions_of(
    layers: dict[str, keras.layers.LSTM],
    shape: tuple[int, ...],
    inputs: tf.Tensor,
    mask: tf.Tensor | None,
) -> dict[str, Callable]:
    """Returns what is timed in this process; only the layers themselves if there is a mask."""
    batch, units = shape[0], shape[3]
    functions = {name: layer_step(layer, inputs, mask) for name, layer in layers.items()}
    if mask is not None:
        return functions
    gpu = bool(tf.config.list_physical_devices("GPU"))
    if not gpu:
        functions["block_lstm"] = block_lstm_step(layers["keras"], inputs)
    # oneDNN, limited to AVX2, ends the process at a bfloat16 product.
    if not gpu and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() != "AVX2":
        half = WarmLSTM(units, return_sequences=True, dtype="mixed_bfloat16")
        half.build(inputs.shape)
        half.set_weights(layers["keras"].get_weights())
        functions[HALF] = layer_step(half, inputs, None)
    for name, layer in layers.items():
        functions[f"{name} inference"] = inference(layer, inputs)
    functions["small products"] = products(4 * units, units, batch, PRODUCTS)
    functions["large product"] = products(GEMM_SIDE, GEMM_SIDE, GEMM_SIDE, 1)
    return functions


def measure(
    shape: tuple[int, ...], padded: bool, torch: Program | None, folder: Path
) -> dict[str, Any]:
    """Returns the times of one shape, in milliseconds, after comparing the results."""
    batch, steps, width, units, repeats = shape
    rng = np.random.default_rng(0)
    inputs = tf.constant(rng.normal(size=(batch, steps, width)), tf.float32)
    # Sorted by length, as the batches of a run are: the longest twice as long as the shortest.
    lengths = np.linspace(steps, steps // 2, batch).astype(int)
    mask = tf.sequence_mask(lengths, steps) if padded else None
    layers = {
        "keras": keras.layers.LSTM(units, return_sequences=True),
        "warmstate": WarmLSTM(units, return_sequences=True),
    }
    for layer in layers.values():
        layer.build(inputs.shape)
    layers["warmstate"].set_weights(layers["keras"].get_weights())
    functions = functions_of(layers, shape, inputs, mask)
    expected = [tensor.numpy() for tensor in functions["keras"]()]
    for name in ("warmstate", "block_lstm"):
        if name in functions:
            check(f"{shape}: {name}", functions[name](), expected)
    if HALF in functions:
        found = [tf.cast(tensor, tf.float32) for tensor in functions[HALF]()]
        check(f"{shape}: {HALF}", found, expected, HALF_TOLERANCE)
    timed = {name: lambda f=function: seconds(f) for name, function in functions.items()}
    if torch and not padded:
        kernel, recurrent, bias = layers["keras"].get_weights()
        held = folder / "layer.npz"
        np.savez(held, inputs=inputs, kernel=kernel, recurrent=recurrent, bias=bias)
        torch.ask("load", str(held))
        torch.ask("results", str(folder / "torch.npz"))
        with np.load(folder / "torch.npz") as answer:
            check(f"{shape}: PyTorch", [answer[name] for name in answer.files], expected)
        timed["pytorch"] = lambda: torch.ask("seconds")
        timed["pytorch inference"] = lambda: torch.ask("inference_seconds")
    in_turn(timed, 1)  # threads, memory
    times = in_turn(timed, repeats)
    name = f"batch {batch}, {steps} steps, {width} -> {units}" + (", padded" if padded else "")
    result = {"name": name, "repeats": repeats}
    result["ms"] = {k: min_and_median([1e3 * t for t in v]) for k, v in times.items()}
    flops = 6 * 4 * units * (width + units) * int(lengths.sum() if padded else batch * steps)
    if not padded:
        result |= limit(shape, times, flops)
    result["gflops"] = {
        k: round(flops / min(v) / 1e9, 1)
        for k, v in times.items()
        if k in ("keras", "warmstate", "pytorch", "block_lstm")
    }
    result["ratios"] = ratios(times)
    return result


def limit(shape: tuple[int, ...], times: dict[str, list[float]], flops: float) -> dict[str, Any]:
    """Returns the rates of the bare products, and the time that they allow."""
    batch, steps, _, units, _ = shape
    small = PRODUCTS * 2 * 4 * units * units * batch / min(times["small products"])
    large = 2 * GEMM_SIDE**3 / min(times["large product"])
    recurrent = 2 * 2 * 4 * units * units * batch * steps  # forward, and dh
    allowed = recurrent / small + (flops - recurrent) / large
    return {
        "small_product_gflops": round(small / 1e9, 1),
        "large_product_gflops": round(large / 1e9, 1),
        "limit_ms": round(1e3 * allowed, 2),
        "percent_of_limit": {
            name: round(100 * allowed / min(times[name]))
            for name in ("warmstate", "keras", "pytorch", "block_lstm")
            if name in times
        },
    }


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Returns how many times faster ours is: the median over the turns of each turn's ratio."""
    found = {}
    for name, values in times.items():
        ours = times["warmstate inference" if name.endswith("inference") else "warmstate"]
        if name not in ("small products", "large product") and values is not ours:
            pairs = zip(values, ours, strict=True)
            found[name] = round(statistics.median(theirs / own for theirs, own in pairs), 2)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| forward and backward, min (median) ms | ours | in bfloat16 | Keras | BlockLSTM "
        "| PyTorch | ours / Keras, PyTorch | of the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def cell(r: dict[str, Any], name: str) -> str:
        if name not in r["ms"]:
            return ""
        return f"{r['ms'][name]['min']:,.0f} ({r['ms'][name]['median']:,.0f})"

    for r in results:
        for suffix in ("", " inference"):
            if f"warmstate{suffix}" not in r["ms"]:
                continue
            programs = ("warmstate", HALF, "keras", "block_lstm", "pytorch")
            names = [f"{n}{suffix}" for n in programs]
            faster = [r["ratios"].get(f"{n}{suffix}") for n in ("keras", "pytorch")]
            percent = r.get("percent_of_limit", {}).get("warmstate") if not suffix else None
            lines.append(
                f"| {r['name']}{suffix and ', forward only'} | "
                + " | ".join(cell(r, name) for name in names)
                + f" | {', '.join(f'{value:.2f} x' for value in faster if value)}"
                + f" | {f'{percent} %' if percent else ''} |"
            )
    return "\n".join(lines)


def main() -> None:
    native.use_in_inference()  # as the programs do
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="lstm_layer", help="name of the JSON")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)))
    parser.add_argument("--repeats", type=int, help="in place of each shape's own number")
    args = parser.parse_args()
    torch = None
    if torch_is_there():
        torch = Program("benchmarks.torch_programs", "layer", python=TORCH_PYTHON)
        if tf.config.list_physical_devices("GPU") and torch.ask("device") != "cuda":
            print("PyTorch is left out: it has no GPU")
            torch.close()
            torch = None
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for i in args.shapes:
            shape = (*SHAPES[i][:4], args.repeats or SHAPES[i][4])
            results.append(measure(shape, False, torch, Path(folder)))
            print(table(results[-1:]), flush=True)
        padded = (*SHAPES[args.shapes[0]][:4], args.repeats or 7)
        results.append(measure(padded, True, None, Path(folder)))
    if torch:
        torch.close()
    print(table(results))
    machine = facts_with_gpu() | {"native": native.operations(training=True) is not None}
    write_results(args.out, machine, results)


if __name__ == "__main__":
    main()
