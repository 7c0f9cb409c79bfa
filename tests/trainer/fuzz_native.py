"""Random operands for the compiled operations: right ones against NumPy, wrong ones to be refused.

    python -m tests.trainer.fuzz_native --sanitize --sets=1000     (make sanitize)

With --sanitize the loops are built anew, so that they watch over memory and what C++ leaves
undefined (AddressSanitizer, UndefinedBehaviorSanitizer), and the first fault ends the program.

Shapes are checked here by a separate rule, written as text: B is the batch, T time, W inputs, U
units, N words, D and C the sides of a matrix; an operand that ends in ? may be left out, as [0].
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from trainer import native  # noqa: E402
from trainer.native.build import build  # noqa: E402

Arrays = dict[str, np.ndarray]
STATES = {"h": "B U", "c": "B U"}
STEPS = {"recurrent": "U 4U", **STATES, "mask": "B T?", "bias": "B 4U?"}
SHAPES: dict[str, dict[str, str]] = {
    "product": {"left": "B T D", "right": "D C", "bias": "C?", "mask": "B T?"},
    "product_transposed": {"left": "B T D", "right": "C D", "bias": "C?", "mask": "B T?"},
    "product_packed": {"left": "B T D", "right": "D C", "bias": "C", "mask": "B T?"},
    "lstm": {"z": "B T 4U", "index": "0", **STEPS},
    "lstm_packed": {"z": "N 4U", "index": "B T", **STEPS},
    "lstm_words": {"z": "N 4U", "index": "B T", **STEPS},
    "lstm_grad": {
        "gates": "B T 4U",
        "recurrent": "U 4U",
        "c": "B U",
        "cells": "B T U",
        "mask": "B T?",
        "d_outputs": "B T U?",
        "d_h": "B U",
        "d_c": "B U",
    },
    "lstm_weight_grad": {
        "inputs": "B T W",
        "outputs": "B T U",
        "h": "B U",
        "d_z": "B T 4U",
        "mask": "B T?",
    },
}
SHAPES["lstm_grad_clipped"] = SHAPES["lstm_grad"]
SHAPES["lstm_in_half"], SHAPES["lstm_grad_in_half"] = SHAPES["lstm"], SHAPES["lstm_grad"]
OF_STEPS = ("z", "d_outputs")  # what goes into the loops at each step has the factors' type
CLIP_NORM = 0.5  # some rows of random gradients are longer, some are not
LARGE = 2**40
SANITIZERS = (
    "-fsanitize=address,undefined",
    # With these, g++ takes no function's address for a constant, as TensorFlow's headers do.
    "-fno-sanitize=null,nonnull-attribute,returns-nonnull-attribute",
    "-fno-sanitize-recover=all",
    "-g1",
    "-O1",
)


def is_right(shapes: Mapping[str, str], given: Mapping[str, tuple[int, ...]]) -> bool:
    """Returns whether there are sizes for the letters that explain all shapes."""
    sizes: dict[str, int] = {}
    for name, text in shapes.items():
        optional, letters = text.endswith("?"), text.rstrip("?").split()
        shape = given[name]
        if optional and shape == (0,):
            continue
        if len(shape) != len(letters):
            return False
        for letter, size in zip(letters, shape, strict=True):
            if letter == "0":
                if size:
                    return False
                continue
            times, letter = (4, letter[1:]) if letter.startswith("4") else (1, letter)
            if size % times or sizes.setdefault(letter, size // times) != size // times:
                return False
    units = sizes.get("U", native.UNITS_MULTIPLE)
    return units > 0 and units % native.UNITS_MULTIPLE == 0


def right_shapes(random: np.random.Generator, name: str) -> dict[str, tuple[int, ...]]:
    """Returns shapes that fit each other; now and then there is nothing, or more than a block."""
    batch = int(random.choice([0, 1, 2, 5, 6, 7, 13, 150], p=[0.03, *[0.155] * 6, 0.04]))
    sizes = {
        "B": batch,
        "T": int(random.integers(0 if random.random() < 0.05 else 1, 7)),
        "U": 16 * int(random.integers(1, 6)),
        "W": int(random.integers(0 if random.random() < 0.05 else 1, 40)),
        "N": int(random.integers(1, 9)),
        "D": int(random.integers(0 if random.random() < 0.05 else 1, 90)),
        "C": int(random.integers(0 if random.random() < 0.05 else 1, 150)),
        "0": 0,
    }
    found = {}
    for operand, text in SHAPES[name].items():
        letters = text.rstrip("?").split()
        shape = tuple(4 * sizes[x[1:]] if x[0] == "4" else sizes[x] for x in letters)
        found[operand] = (0,) if text.endswith("?") and random.random() < 0.3 else shape
    return found


def wrong_shape(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns another shape."""
    if not shape or random.random() < 0.15:
        return (*shape, int(random.integers(0, 3)))
    kind, axis = random.integers(0, 7), int(random.integers(0, len(shape)))
    if kind == 0:
        return shape[:axis] + shape[axis + 1 :]
    if kind == 1:
        return shape[::-1]
    if kind == 2:
        return (0,)
    size = shape[axis]
    other = [size + 1, max(size - 1, 0), 2 * size, 1, 0, LARGE][int(random.integers(0, 6))]
    changed = (*shape[:axis], other, *shape[axis + 1 :])
    if other == LARGE and 0 not in changed:  # nothing may be so large but what is empty
        place = (axis + 1) % len(shape)
        changed = (*changed[:place], 0, *changed[place + 1 :])
    return tuple(size for size in changed) if np.prod([float(s) for s in changed]) < 1e6 else (0,)


def arrays_of(random: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Returns operands of these shapes."""
    found: Arrays = {}
    for name, shape in shapes.items():
        if name == "mask":
            found[name] = random.random(shape) < 0.7
        elif name == "index":
            words = shapes["z"][0] if shapes["z"] else 1
            found[name] = random.integers(0, max(words, 1), shape).astype(np.int32)
        elif name == "gates":
            found[name] = random.random(shape).astype(np.float32)
        else:
            found[name] = (0.4 * random.normal(size=shape)).astype(np.float32)
            if name in OF_STEPS:  # bfloat16 holds them exactly: only factors are rounded
                found[name] = found[name].astype(tf.bfloat16.as_numpy_dtype).astype(np.float32)
    return found


# ---- What NumPy makes of them ----


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def shown_by(mask: np.ndarray, batch: int, steps: int) -> np.ndarray:
    return mask if mask.ndim == 2 else np.ones((batch, steps), bool)


def product(x: Arrays, transposed: bool) -> list[np.ndarray]:
    """Returns left @ right + bias where the mask shows it."""
    right = x["right"].T if transposed else x["right"]
    # Not `@`: it visits each matrix of the batch, and there may be 2^40 without rows.
    found = np.tensordot(x["left"], right, 1) + (x["bias"] if x["bias"].size else 0)
    return [found * shown_by(x["mask"], *found.shape[:2])[:, :, None]]


def lstm(x: Arrays) -> list[np.ndarray]:
    """Returns outputs, the final states, gates and cells, by the textbook equations."""
    z = x["z"][x["index"]] if x["index"].ndim == 2 else x["z"]
    if x["bias"].ndim == 2:
        z = z + x["bias"][:, None]
    (batch, steps), units, h, c = z.shape[:2], len(x["recurrent"]), x["h"], x["c"]
    shown = shown_by(x["mask"], batch, steps)
    outputs, cells = (np.zeros((batch, steps, units)) for _ in range(2))
    gates = np.zeros((batch, steps, 4 * units))
    for t in range(steps if batch else 0):
        i, f, g, o = np.split(z[:, t] + h @ x["recurrent"], 4, 1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        now = shown[:, t, None]
        c = np.where(now, f * c + i * g, c)
        h = np.where(now, o * np.tanh(c), h)
        outputs[:, t], cells[:, t] = h, c
        gates[:, t] = np.concatenate([i, f, g, o], 1) * now
    return [outputs, h, c, gates, cells]


def lstm_grad(x: Arrays, clip_norm: float = np.inf) -> list[np.ndarray]:
    """Returns the gradients of z, of the states at the start and of the rows' biases."""
    batch, steps, units = x["cells"].shape
    d_h, d_c, shown = x["d_h"], x["d_c"], shown_by(x["mask"], batch, steps)
    d_z = np.zeros((batch, steps, 4 * units))
    for t in reversed(range(steps if batch else 0)):
        if x["d_outputs"].ndim == 3:
            d_h = d_h + x["d_outputs"][:, t]
        i, f, g, o = np.split(x["gates"][:, t], 4, 1)
        before = x["cells"][:, t - 1] if t else x["c"]
        squashed, now = np.tanh(x["cells"][:, t]), shown[:, t, None]
        of_c = d_c + d_h * o * (1 - squashed**2)
        of_gates = [of_c * g * i * (1 - i), of_c * before * f * (1 - f), of_c * i * (1 - g**2)]
        d_z[:, t] = np.concatenate([*of_gates, d_h * squashed * o * (1 - o)], 1) * now
        d_c = np.where(now, of_c * f, d_c)
        of_step = d_z[:, t] @ x["recurrent"].T
        norms = np.linalg.norm(of_step, axis=1, keepdims=True)
        of_step *= np.minimum(1, clip_norm / np.maximum(norms, 1e-30))
        d_h = np.where(now, of_step, d_h)
    return [d_z, d_h, d_c, d_z.sum(1)]


def lstm_weight_grad(x: Arrays) -> list[np.ndarray]:
    """Returns the gradients of kernel and recurrent kernel."""
    shown = shown_by(x["mask"], *x["inputs"].shape[:2])[:, :, None]
    before = np.concatenate([x["h"][:, None], x["outputs"]], 1)[:, : x["outputs"].shape[1]]
    d_z = x["d_z"] * shown
    return [np.einsum("btm,btn->mn", left, d_z) for left in (x["inputs"], before)]


EXPECTED: dict[str, Callable[[Arrays], list[np.ndarray]]] = {
    "product": lambda x: product(x, False),
    "product_transposed": lambda x: product(x, True),
    "product_packed": lambda x: product(x, False),
    "lstm": lstm,
    "lstm_words": lstm,
    "lstm_packed": lstm,
    "lstm_grad": lstm_grad,
    "lstm_grad_clipped": lambda x: lstm_grad(x, CLIP_NORM),
    "lstm_in_half": lstm,
    "lstm_grad_in_half": lstm_grad,
    "lstm_weight_grad": lstm_weight_grad,
}


# ---- The comparison ----


def run(name: str, x: Mapping[str, Any]) -> list[tf.Tensor]:
    """Returns what the operation gives."""
    operations = native.operations(training=True)
    assert operations
    if name.endswith("_packed"):
        operand = "recurrent" if name == "lstm_packed" else "right"
        of_gates = name == "lstm_packed"
        x = {**x, operand: operations.warmstate_pack(x[operand], of_gates=of_gates)}
    if name.startswith("product"):
        return [operations.warmstate_product(*x.values(), transpose=name == "product_transposed")]
    if name == "lstm_weight_grad":
        return list(operations.warmstate_lstm_weight_grad(*x.values()))
    factors = tf.bfloat16 if name.endswith("_in_half") else tf.float32
    x = {k: tf.cast(v, factors) if k in OF_STEPS else v for k, v in x.items()}
    if name.startswith("lstm_grad"):
        clip_norm = CLIP_NORM if name == "lstm_grad_clipped" else 0
        found = operations.warmstate_lstm_grad(*x.values(), clip_norm=clip_norm)
    else:
        kept = {"keep": True, "return_sequences": True}
        found = operations.warmstate_lstm(*x.values(), **kept)
    return [tf.cast(tensor, tf.float32) for tensor in found]


def check_values(name: str, x: Arrays, found: list[np.ndarray]) -> None:
    """Raises AssertionError unless they are NumPy's up to rounding."""
    expected = EXPECTED[name](
        {k: v if v.dtype != np.float32 else v.astype(float) for k, v in x.items()}
    )
    for ours, theirs in zip(found, expected, strict=True):
        # Sums of at most 1,000 terms of about 1, each rounded to 24 bits; in half, of at most 320
        # terms of about 0.1, whose factors are rounded to 8: of 1,600 sets the worst needs 0.026.
        tolerance = 0.04 if name.endswith("_in_half") else 1e-4
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def check_shape_function(name: str, x: Arrays, is_right: bool, found: list[np.ndarray]) -> None:
    """Raises AssertionError unless the shapes are known, or refused, before anything runs."""
    known = [tf.TensorSpec(v.shape, v.dtype) for v in x.values()]

    @tf.function(autograph=False)
    def function(*given: tf.Tensor) -> list[tf.Tensor]:
        return run(name, dict(zip(x, given, strict=True)))

    try:
        graph = function.get_concrete_function(*known)
    except ValueError as error:
        assert not is_right, error
        return
    if found:
        assert [tuple(t.shape) for t in graph.outputs] == [array.shape for array in found]


def one_set(random: np.random.Generator, name: str) -> str:
    """Checks one set of operands; returns what it was."""
    shapes = right_shapes(random, name)
    if random.random() < 0.5:
        operand = str(random.choice(list(shapes)))
        shapes[operand] = wrong_shape(random, shapes[operand])
    x = arrays_of(random, shapes)
    right = is_right(SHAPES[name], shapes)
    if right and x.get("index", np.zeros(0)).size and random.random() < 0.2:
        place = tuple(int(random.integers(0, size)) for size in x["index"].shape)
        x["index"][place] = random.choice([-1, len(x["z"]), 2**31 - 1, -(2**31)])
    if right and name in ("lstm_words", "lstm_packed"):
        right = bool(np.all((x["index"] >= 0) & (x["index"] < len(x["z"]))))
    # As in training, gates and z may be overwritten: operands that nobody holds any more.
    found: list[np.ndarray] = []
    try:
        found = [tensor.numpy() for tensor in run(name, {k: tf.constant(v) for k, v in x.items()})]
    except tf.errors.InvalidArgumentError as error:
        assert not right, error
    except tf.errors.ResourceExhaustedError:
        # Operands of 2^40 x 0 numbers are right, but their result has 2^40 rows.
        assert right and any(LARGE in shape for shape in shapes.values()), shapes
        return "right, too large"
    else:
        assert right, f"{name} took {shapes}"
        check_values(name, x, found)
    if random.random() < 0.02:
        check_shape_function(name, x, is_right(SHAPES[name], shapes), found)
    return "right" if right else "wrong"


def fuzz(sets: int, seed: int) -> None:
    """Checks so many sets, each with the next instruction set; prints how many of which kind."""
    counts: collections.Counter[str] = collections.Counter()
    began, instruction_sets = time.monotonic(), native.instruction_sets()
    for i in range(sets):
        random = np.random.default_rng((seed, i))
        name = str(random.choice(list(SHAPES)))
        with native.using(instruction_sets[i % len(instruction_sets)]):
            try:
                counts[f"{name}, {one_set(random, name)}"] += 1
            except BaseException:
                print(
                    f"--seed={seed}, set {i}: {name}, {instruction_sets[i % len(instruction_sets)]}"
                )
                raise
    for kind, count in sorted(counts.items()):
        print(f"{kind}: {count}")
    print(f"{sets} sets in {time.monotonic() - began:.0f} s: {', '.join(instruction_sets)}")


def sanitized(arguments: list[str]) -> int:
    """Runs this program in a build with sanitizers; returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "lstm.so"
        build(library, SANITIZERS)
        runtimes = [
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtimes),
            # Python and TensorFlow leave memory behind on purpose.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-m", "tests.trainer.fuzz_native", f"--library={library}"]
        return subprocess.run([*command, *arguments], env=environment).returncode


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--library", type=Path, default=native.library_path())
    options = parser.parse_args()
    if options.sanitize:
        return sanitized([f"--sets={options.sets}", f"--seed={options.seed}"])
    native.library_path = lambda: options.library
    fuzz(options.sets, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
