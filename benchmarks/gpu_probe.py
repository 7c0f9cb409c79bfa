"""Some steps of pretraining in this process: losses, weights' digest, speed, memory, placement.

The step is the product's: its configuration, batches, distributor, determinism. For gpu_sections.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import tensorflow as tf  # noqa: E402
from tensorflow.python.eager import context as eager_context  # noqa: E402

from data_pipelines.store.token_store import TokenStore  # noqa: E402
from trainer.config import Config  # noqa: E402
from trainer.distribution.tf_distribute import one_device  # noqa: E402
from trainer.reporting.status_server import Vitals  # noqa: E402
from trainer.stages import pretrain  # noqa: E402
from trainer.stages.run_stage import turn_on_determinism  # noqa: E402
from trainer.training.loop import Training  # noqa: E402
from trainer.training.run import Run  # noqa: E402

FLOATS = {tf.as_dtype(name).as_datatype_enum for name in ("float32", "float16", "bfloat16")}
# They hand tensors on and compute nothing.
HANDS_ON = {"_Send", "_Recv", "_HostSend", "_HostRecv", "_Arg", "_Retval", "Const", "Identity"}


def train(
    flags: dict[str, Any], steps: int, tf32: bool = True, profiled: bool = False
) -> dict[str, Any]:
    """Returns what `steps` steps of pretraining gave.

    Args:
        flags: Of `Config`; `store` among them.
        tf32: Whether products of float32 may run in TF32, TensorFlow's default.
        profiled: Whether to profile as many steps more, for the GPU's busy share.
    """
    turn_on_determinism()
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    with tempfile.TemporaryDirectory() as folder:
        config = Config(stage="pretrain", run_dir=folder, pretrain_steps=2 * steps + 2, **flags)
        run = Run(config, one_device(), TokenStore(config.store), None, lambda line: None, Vitals())
        _, task, batches, _ = pretrain.set_up(run, Path(folder))
        step = Training(run, task, batches).step
        iterator = iter(batches(0, 2 * steps + 2))
        _reset_peak()
        on_host = _floats_on_host(step, next(iterator))
        found = {"on_host": on_host, **_steps(step, iterator, steps)}
        found["copy_ms"] = _copy_ms(next(iterator))
        found["digest"] = _digest(task.variables)
        found["peak_megabytes"] = _peak_megabytes()
        if profiled:
            found["busy_percent"] = _busy_percent(step, iterator, steps, Path(folder, "profile"))
    return found


def _steps(step: Any, iterator: Any, count: int) -> dict[str, Any]:
    """Returns losses, norms of all gradients, and medians of times and tokens."""
    losses, norms, tokens, waits, times = [], [], [], [], []
    for _ in range(count):
        began = time.perf_counter()
        batch = next(iterator)
        ready = time.perf_counter()
        outcome = step(batch, tf.constant(0.0))
        losses.append(float(outcome.loss))  # waits for the step
        times.append(time.perf_counter() - ready)
        waits.append(ready - began)
        norms.append(outcome.norms.numpy().tolist())
        tokens.append(float(outcome.tokens))
    seconds = statistics.median(times)
    return {
        "losses": losses,
        "norms": norms,
        "step_ms": round(1e3 * seconds, 2),
        "input_wait_percent": round(100 * sum(waits) / sum(waits + times), 2),
        "tokens_per_step": statistics.median(tokens),
        "tokens_per_second": round(sum(tokens) / sum(waits + times), 1),
    }


def _copy_ms(batch: dict[str, tf.Tensor]) -> float:
    """Returns how long a batch takes to the GPU; on a CPU a copy in memory."""
    with tf.device("GPU:0" if _gpus() else "CPU:0"):
        tf.identity(batch["tokens"])
        began = time.perf_counter()
        copies = [tf.identity(tensor) for tensor in batch.values()]
        tf.test.experimental.sync_devices()
    del copies
    return round(1e3 * (time.perf_counter() - began), 3)


def _digest(variables: Any) -> str:
    held = hashlib.sha256()
    for _, variable in sorted(variables.items()):
        held.update(variable.numpy().tobytes())
    return held.hexdigest()[:16]


def _gpus() -> list[Any]:
    return tf.config.get_visible_devices("GPU")


def _reset_peak() -> None:
    if _gpus():
        tf.config.experimental.reset_memory_stats("GPU:0")


def _peak_megabytes() -> float:
    """Returns the GPU's most used memory since `_reset_peak`; without a GPU the process's."""
    from benchmarks.processes import peak_megabytes

    if not _gpus():
        return round(peak_megabytes())
    return round(tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20)


def _busy_percent(step: Any, iterator: Any, count: int, folder: Path) -> float:
    """Returns the share of the steps' time in which a kernel runs; on a CPU an operation."""
    tf.profiler.experimental.start(str(folder))
    began = time.perf_counter()
    for _ in range(count):
        float(step(next(iterator), tf.constant(0.0)).loss)
    elapsed = time.perf_counter() - began
    tf.profiler.experimental.stop()
    return round(100 * busy_seconds(folder, "/device:GPU" if _gpus() else "/host:CPU") / elapsed, 1)


def busy_seconds(folder: Path, plane_name: str) -> float:
    """Returns how long at least one event of the profile's planes with this start of name runs."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    (path,) = folder.glob("**/*.xplane.pb")
    spans = []
    for plane in xplane_pb2.XSpace.FromString(path.read_bytes()).planes:
        if plane.name.startswith(plane_name):
            for line in plane.lines:
                begin = line.timestamp_ns * 1000
                spans += [
                    (begin + event.offset_ps, begin + event.offset_ps + event.duration_ps)
                    for event in line.events
                ]
    busy, end = 0, 0
    for start, stop in sorted(spans):
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e12


def _floats_on_host(step: Any, batch: Any) -> dict[str, int]:
    """Takes the first step; returns the operations on floats placed on the host, and how often."""
    context = eager_context.context()
    context.enable_run_metadata()
    step(batch, tf.constant(0.0)).loss.numpy()
    graphs = context.export_run_metadata().function_graphs
    context.disable_run_metadata()
    nodes = [n for graph in graphs for part in graph.partition_graphs for n in part.node]
    if not nodes:
        raise RuntimeError("TensorFlow gave no placed graphs: the placement cannot be checked")
    found = Counter(
        node.op
        for node in nodes
        if "CPU" in node.device and node.op not in HANDS_ON
        if FLOATS & {value.type for value in node.attr.values()}
    )
    return dict(found.most_common())


def elsewhere(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what `train` gives for each of `calls` in a process that sees no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_probe", json.dumps(calls)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps([train(**call) for call in json.loads(sys.argv[1])]))
