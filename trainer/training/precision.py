"""--precision=auto: bfloat16 if this machine is measured to be faster with it."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from data_pipelines.errors import InputError
from trainer import native
from trainer.config import Config
from trainer.distribution.distributor import Distributor
from trainer.models.lstm import WarmLSTM
from trainer.safe_files import DamagedError, opened, replace_text

CHOICES = ("float32", "mixed_bfloat16")
STEPS = 60
REPEATS = 5
# How much faster bfloat16 must be: it costs accuracy.
MARGIN = 1.1


def resolved(
    config: Config, distributor: Distributor, folder: Path, log: Callable[[str], None]
) -> Config:
    """Returns the configuration with a measured choice for --precision=auto; a collective.

    The chief measures once and keeps the choice in `folder`, so that a resumed run has the same.

    Raises:
        InputError: In every worker: the choice cannot be read or kept.
    """
    if config.precision != "auto" or config.stage == "evaluate":  # which reads in float32
        return config
    finetunes = config.stage == "finetune"
    batch_size = config.finetune_batch_size if finetunes else config.pretrain_batch_size
    sizes = (max(1, batch_size // distributor.num_shards), config.embedding_dim, config.units)
    choice, fault, path = "", "", folder / "precision.txt"
    if distributor.is_chief:
        try:
            choice = _remembered(path) if config.resume == "auto" else ""
            if not choice:
                choice = _faster(sizes, log)
                replace_text(path, choice + "\n")
        except OSError as error:
            fault = (
                f"--precision=auto: the choice is kept in {path}: {error.strerror}: make room or "
                f"make it writable, or set --precision to one of {', '.join(CHOICES)}"
            )
        except DamagedError as error:
            fault = f"--precision=auto: {error}; put it right, or start again with --resume=never"
    choice, fault = distributor.gather_objects([choice, fault])[0]
    if fault:
        raise InputError(fault)
    return dataclasses.replace(config, precision=choice)


def _remembered(path: Path) -> str:
    """Returns the choice that the run began with, or "" if it has none yet.

    Raises:
        DamagedError: The file holds something else.
    """
    if not path.exists():
        return ""
    with opened(path) as file:
        said = file.read(99).decode(errors="replace").removesuffix("\n")
    if said not in CHOICES:
        raise DamagedError(f"{path} holds {said!r}, not one of {', '.join(CHOICES)}")
    return said


def _faster(sizes: tuple[int, int, int], log: Callable[[str], None]) -> str:
    """Returns the faster one of CHOICES, measured now."""
    if native.allowed_by_onednn() in ("avx2", "portable"):
        # TensorFlow asks the processor, not this variable, and its product would end the process.
        limit = os.environ["ONEDNN_MAX_CPU_ISA"]
        log(f"precision: float32; ONEDNN_MAX_CPU_ISA={limit} forbids products in bfloat16")
        return "float32"
    seconds = measure(*sizes)
    ratio = seconds["float32"] / seconds["mixed_bfloat16"]
    chosen = CHOICES[ratio > MARGIN]
    log(f"precision: {chosen}; with bfloat16 the LSTM is {ratio:.2f} times as fast here")
    return chosen


def measure(rows: int, inputs: int, units: int) -> dict[str, float]:
    """Returns the seconds of a forward and a backward pass of STEPS steps, by precision."""
    steps = {precision: _step(precision, rows, inputs, units) for precision in CHOICES}
    times: dict[str, list[float]] = {precision: [] for precision in CHOICES}
    for _ in range(1 + REPEATS):  # in turn; the first run includes tracing
        for precision, step in steps.items():
            began = time.perf_counter()
            step().numpy()
            times[precision].append(time.perf_counter() - began)
    return {precision: min(values[1:]) for precision, values in times.items()}


def _step(precision: str, rows: int, inputs: int, units: int) -> Callable[[], tf.Tensor]:
    layer = WarmLSTM(units, return_sequences=True, dtype=precision)
    layer.build((rows, STEPS, inputs))
    sequences = tf.random.stateless_normal((rows, STEPS, inputs), (0, 0))
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function(autograph=False)
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(sequences, training=True))
        return tf.add_n([tf.reduce_sum(g) for g in tape.gradient(loss, weights)])

    return step
