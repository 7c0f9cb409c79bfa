"""How well a GPU is used at the paper's size, on paper: FLOP, bytes, launches and times a step.

    python -m benchmarks.gpu_paper      prints the tables of docs/gpu.md

A step is the sequence autoencoder of trainer/configs/paper/imdb-sa-lstm.cfg: one LSTM reads a
document and writes it again. Each part takes the longest of three times: of its arithmetic, of its
bytes, and of starting its kernels. The recurrence is counted step by step: no product of a time
step can start before the one before it has ended.
"""

import math
from dataclasses import dataclass, replace

from benchmarks.processes import markdown_table


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits, from its data sheet.

    Attributes:
        flops: dense tensor-core (T4 in float32: CUDA-core) FLOP/s of the precision.
        bytes_per_second: of its memory.
        processors: streaming multiprocessors.
        launch_seconds: from the end of one dependent kernel to the start of the next, both in one
            stream.
    """

    name: str
    precision: str
    flops: float
    bytes_per_second: float
    processors: int
    launch_seconds: float = 3e-6

    @property
    def bytes_per_value(self) -> int:
        return 4 if self.precision in ("float32", "TF32") else 2


GPUS = (
    Gpu("H100 SXM", "TF32", 494.7e12, 3.35e12, 132),
    Gpu("H100 SXM", "bfloat16", 989.4e12, 3.35e12, 132),
    Gpu("T4", "float32", 8.1e12, 0.32e12, 40),
    Gpu("T4", "float16", 65e12, 0.32e12, 40),
)
PRODUCT_SHARE = 0.6  # of the peak, of a product that fills all processors
TILE = (64, 128)  # of a product's result, for each processor at a time
ELEMENTWISE_KERNELS = 60  # of loss, clipping, optimizer and tables
STEP_KERNELS = 2  # of a time step in cuDNN's standard algorithm: product, gates


@dataclass(frozen=True)
class Size:
    """What a step computes: rows of a mean length, sizes of the model."""

    rows: int = 128
    tokens: int = 230  # mean of IMDB's reviews, cut at 400
    longest: int = 240  # of a batch of about one length, padded
    inputs: int = 512
    units: int = 1024
    vocabulary: int = 80_000
    candidates: int = 1024
    passes: int = 2  # reading and writing

    @property
    def recurrent_flop(self) -> float:
        """Products with the recurrent matrix, forward and to the states before, with padding."""
        return 2 * 2 * self.rows * self.longest * self.passes * 4 * self.units**2

    @property
    def large_flop(self) -> float:
        """Products over all time steps at once: inputs, weights' gradients, softmax."""
        steps = self.rows * self.longest * self.passes
        lstm = steps * 4 * self.units * (3 * self.inputs + self.units)
        return 2 * (lstm + 3 * self.rows * self.tokens * self.units * self.candidates)

    @property
    def table_bytes(self) -> float:
        """Rows of both tables, their moments and gradients, read and written, in float32."""
        distinct = min(self.vocabulary, self.rows * self.tokens // 4)
        return 4 * 7 * (distinct * self.inputs + (distinct + self.candidates) * self.units)


def useful_flop(size: Size) -> float:
    """Returns what a step without padding has to compute; the formula of docs/pretraining.md."""
    lstm = size.passes * 8 * size.units * (size.inputs + size.units)
    return 3.0 * size.rows * size.tokens * (lstm + 2 * size.units * size.candidates)


def small_product_share(gpu: Gpu, size: Size) -> float:
    """Returns the share of the peak of a time step's product: its tiles leave processors idle."""
    tiles = math.ceil(size.rows / TILE[0]) * math.ceil(4 * size.units / TILE[1])
    waves = math.ceil(tiles / gpu.processors)
    return PRODUCT_SHARE * tiles / (waves * gpu.processors)


def estimate(gpu: Gpu, size: Size = Size(), persistent: bool = False) -> dict[str, str | float]:
    """Returns the milliseconds of a step by part, and the share of the peak that they leave.

    Args:
        persistent: whether the recurrent matrix stays in registers and shared memory, as in
            cuDNN's persistent kernels: then a time step reads no weights and starts no kernel.
    """
    time_steps = 2 * size.passes * size.longest  # forward and backward
    arithmetic = size.recurrent_flop / (small_product_share(gpu, size) * gpu.flops)
    weights = 4 * size.units**2 * gpu.bytes_per_value
    states = 12 * size.rows * size.units * gpu.bytes_per_value
    bytes_ = time_steps * (states if persistent else weights + states) / gpu.bytes_per_second
    # Blocks of a persistent kernel still wait for each other at every time step.
    starts = time_steps * (1e-6 if persistent else STEP_KERNELS * gpu.launch_seconds)
    recurrence = max(arithmetic, bytes_) + starts
    large = size.large_flop / (PRODUCT_SHARE * gpu.flops)
    rest = size.table_bytes / gpu.bytes_per_second + ELEMENTWISE_KERNELS * gpu.launch_seconds
    seconds = recurrence + large + rest
    return {
        "GPU": gpu.name,
        "precision": gpu.precision,
        "rows": size.rows,
        "recurrence": "persistent" if persistent else "a product a step",
        "kernel starts": ELEMENTWISE_KERNELS + (4 if persistent else STEP_KERNELS * time_steps),
        "recurrence, ms": round(1e3 * recurrence, 1),
        "of it kernel starts, ms": round(1e3 * starts, 1),
        "large products, ms": round(1e3 * large, 1),
        "tables and rest, ms": round(1e3 * rest, 1),
        "step, ms": round(1e3 * seconds, 1),
        "tokens/s": f"{size.rows * size.tokens / seconds:,.0f}",
        "MFU, %": round(100 * useful_flop(size) / seconds / gpu.flops, 1),
    }


def rows() -> list[dict[str, str | float]]:
    """Returns the table: each GPU as it is, then an H100 with few rows and with what helps."""
    found = [estimate(gpu) for gpu in GPUS]
    best = GPUS[1]
    found.append(estimate(best, replace(Size(), rows=16)))
    found.append(estimate(best, persistent=True))
    found.append(estimate(best, replace(Size(), rows=512)))
    found.append(estimate(best, replace(Size(), rows=512), persistent=True))
    return found


def amounts(size: Size = Size()) -> list[dict[str, str | float]]:
    """Returns what a step has to do, whatever the GPU."""
    weights = 4 * size.units * (size.inputs + size.units + 1)
    kept = size.passes * size.rows * size.longest * 6 * size.units
    return [
        {"of a step": "tokens", "amount": f"{size.rows * size.tokens:,}"},
        {"of a step": "FLOP without padding", "amount": f"{useful_flop(size) / 1e12:.2f} T"},
        {
            "of a step": "FLOP in products one after the other",
            "amount": f"{size.recurrent_flop / 1e12:.2f} T",
        },
        {"of a step": "FLOP in large products", "amount": f"{size.large_flop / 1e12:.2f} T"},
        {
            "of a step": "time steps, forward and backward",
            "amount": f"{2 * size.passes * size.longest:,}",
        },
        {"of a step": "LSTM's weights", "amount": f"{weights / 1e6:.1f} M"},
        {"of a step": "bytes of the tables' rows", "amount": f"{size.table_bytes / 1e9:.2f} GB"},
        {"of a step": "activations kept, float32", "amount": f"{4 * kept / 1e9:.2f} GB"},
    ]


def peak_flops(device: str | None, precision: str) -> float | None:
    """Returns the peak of a device by the name that TensorFlow gives it, None if not listed."""
    wanted = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}.get(precision, precision)
    same = {"float32": ("float32", "TF32"), "float16": ("float16", "bfloat16")}
    for gpu in GPUS:
        if gpu.name.split()[0] in (device or "") and gpu.precision in same.get(wanted, (wanted,)):
            return gpu.flops
    return None


def main() -> None:
    print(markdown_table(amounts()), markdown_table(rows()), sep="\n\n")


if __name__ == "__main__":
    main()
