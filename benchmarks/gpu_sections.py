"""The sections of `make gpu-check`, each a process: benchmarks.gpu_sections NAME SETTINGS OUT.

A section returns rows for a table, and what is not as it should be. At smoke size on a CPU all of
it runs too; what only a GPU can have, such as a share of its peak, is then None.
"""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import gpu_paper
from benchmarks.machine import facts_with_gpu

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
# Of losses and of norms of gradients, relative: float32 sums in another order; TF32 has 10 bits.
TOLERANCE = {"float32": 1e-4, "TF32": 2e-2}
MODEL = {"embedding_dim": 512, "units": 1024, "sampled_softmax": 1024, "pretrain_dropout": 0.2}
BATCH = {"pretrain_batch_size": 128, "pretrain_max_tokens": 400}
SMOKE = {"embedding_dim": 8, "units": 16, "sampled_softmax": 64, "pretrain_dropout": 0.2}
SMOKE_BATCH = {"pretrain_batch_size": 8, "pretrain_max_tokens": 24}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the sections run.

    Attributes:
        dry_run: On the CPU, at smoke size.
        store: Token store of the short runs.
        work: Folder of runs, kept for a resumed check.
        source: Flags that name the reviews of the two long runs.
    """

    dry_run: bool
    store: str
    work: str
    source: list[str]

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of short runs: the paper's model, or a small one."""
        chosen = {**SMOKE, **SMOKE_BATCH} if self.dry_run else {**MODEL, **BATCH}
        return {"store": self.store, "pretrain_evaluate_documents": 8, **chosen}

    @property
    def steps(self) -> int:
        return 3 if self.dry_run else 20


class Found(NamedTuple):
    """What a section found.

    Attributes:
        rows: Of one table; the same keys in each.
        faults: What is not as it should be.
    """

    rows: list[Row]
    faults: list[str]


def placement(settings: Settings) -> Found:
    """Operations on floating-point numbers that a step runs on the host."""
    from benchmarks import gpu_probe

    rows, faults = [], []
    for name, more in {
        "autoencoder": {},
        "language model, carried": {
            "pretrain_objective": "language_model",
            "pretrain_packing": "stream",
            "tied_softmax": True,
        },
        "recurrent weight dropout": {"recurrent_weight_dropout": 0.3},
    }.items():
        found = gpu_probe.train(settings.flags | more, 2)["on_host"]
        rows.append({"step": name, "operations on the host": sum(found.values())})
        if found and not settings.dry_run:
            faults.append(f"{name}: on the host are {found}")
    return Found(rows, faults)


def equality(settings: Settings) -> Found:
    """Losses and norms of gradients against the same steps on the CPU."""
    from benchmarks import gpu_probe

    flags = settings.flags | {"pretrain_batch_size": 8}
    call = {"flags": flags, "steps": 3}
    (expected,) = gpu_probe.elsewhere([call])
    rows, faults = [], []
    for name, bound in TOLERANCE.items():
        found = gpu_probe.train(**call, tf32=name == "TF32")
        off = {part: _off(found[part], expected[part]) for part in ("losses", "norms")}
        rows.append({"precision": name, **{f"{k} off by": f"{v:.1e}" for k, v in off.items()}})
        rows[-1]["bound"] = f"{bound:.0e}"
        faults += [f"{name}: {k} differ by {v:.1e}" for k, v in off.items() if not v <= bound]
    return Found(rows, faults)


def _off(found: Any, expected: Any) -> float:
    a, b = np.asarray(found), np.asarray(expected)
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-3 * np.max(np.abs(b)))))


def determinism(settings: Settings) -> Found:
    """Bits of the weights after the same steps twice, and after a run that TERM has interrupted."""
    from benchmarks import gpu_probe

    rows, faults = [], []
    for precision in PRECISIONS:
        flags = settings.flags | {"precision": precision}
        first, second = (gpu_probe.train(flags, settings.steps)["digest"] for _ in range(2))
        rows.append({"what": f"twice, {precision}", "equal bits": first == second})
    whole, resumed = (_encoder_digest(settings, name) for name in ("whole", "interrupted"))
    rows.append({"what": "interrupted and resumed", "equal bits": whole == resumed})
    faults += [f"{row['what']}: other bits" for row in rows if not row["equal bits"]]
    return Found(rows, faults)


def _encoder_digest(settings: Settings, name: str) -> str:
    """Returns the digest of the encoder of a run, which is interrupted once if that is its name."""
    folder = Path(settings.work, "determinism", name)
    flags = _as_flags(settings.flags | {"log_every_steps": 1, "checkpoint_every_steps": 10})
    steps = 12 if settings.dry_run else 60
    command = _trainer(f"--run_dir={folder}", "--stage=pretrain", f"--pretrain_steps={steps}")
    command += [*flags, "--resume=auto"]
    if name == "interrupted" and not (folder / "encoder").exists():
        _run_until(command, folder, lambda metrics: metrics["step"] >= steps // 3)
    _run(command)
    return hashlib.sha256((folder / "encoder/encoder.safetensors").read_bytes()).hexdigest()


def precisions(settings: Settings) -> Found:
    """Loss, speed and memory of a step in each precision, TF32 off and on."""
    from benchmarks import gpu_probe

    rows, faults = [], []
    for precision, tf32 in [("float32", False), *((each, True) for each in PRECISIONS)]:
        found = gpu_probe.train(settings.flags | {"precision": precision}, settings.steps, tf32)
        name = "TF32" if precision == "float32" and tf32 else precision
        rows.append({"precision": name, "last loss": round(found["losses"][-1], 4)})
        rows[-1] |= {key: found[key] for key in ("step_ms", "tokens_per_second", "peak_megabytes")}
        if not np.isfinite(found["losses"]).all():
            faults.append(f"{name}: a loss is not finite")
    off = max(abs(row["last loss"] / rows[0]["last loss"] - 1) for row in rows)
    faults += [f"last losses differ by {off:.1%}"] if off > 0.02 else []
    return Found(rows, faults)


def layer(settings: Settings) -> Found:
    """Our LSTM layer against Keras's with cuDNN, and PyTorch's: `benchmarks.lstm_layer`."""
    out = Path("benchmarks/results/lstm_layer_gpu_check.json")
    command = [sys.executable, "-m", "benchmarks.lstm_layer", f"--out={out.stem}"]
    if settings.dry_run:
        command += ["--shapes", "2", "--repeats=1"]
    try:
        _run(command)
        results = json.loads(out.read_text())["results"]
    finally:
        out.unlink(missing_ok=True)
    rows = [
        {"shape": each["name"]}
        | {f"{name}, ms": each["ms"].get(name, {}).get("median") for name in ("warmstate", "keras")}
        | {"PyTorch, ms": each["ms"].get("pytorch", {}).get("median")}
        for each in results
    ]
    slower = [r["shape"] for r in rows if r["warmstate, ms"] > 1.05 * r["keras, ms"]]
    slower = [] if settings.dry_run else slower
    return Found(rows, [f"{shape}: slower than Keras's layer" for shape in slower])


def step(settings: Settings) -> Found:
    """A step at the paper's size: share in kernels, of the peak, input wait, memory."""
    from benchmarks import gpu_probe

    device, rows, faults = facts_with_gpu().get("gpu_name"), [], []
    for precision in PRECISIONS[:2]:
        flags = settings.flags | {"precision": precision}
        found = gpu_probe.train(flags, settings.steps, profiled=True)
        size = dataclasses.replace(
            gpu_paper.Size(),
            rows=flags["pretrain_batch_size"],
            tokens=round(found["tokens_per_step"] / flags["pretrain_batch_size"]),
            inputs=flags["embedding_dim"],
            units=flags["units"],
            candidates=flags["sampled_softmax"],
        )
        per_second = gpu_paper.useful_flop(size) / found["step_ms"] * 1e3
        peak = gpu_paper.peak_flops(device, precision)
        keys = ("step_ms", "tokens_per_second", "busy_percent", "input_wait_percent", "copy_ms")
        rows.append({"precision": precision, **{key: found[key] for key in keys}})
        rows[-1] |= {"peak_megabytes": found["peak_megabytes"]}
        rows[-1] |= {"TFLOP/s": round(per_second / 1e12, 4)}
        rows[-1] |= {"MFU, %": round(100 * per_second / peak, 1) if peak else None}
        if found["input_wait_percent"] > 5 and not settings.dry_run:
            faults.append(f"{precision}: {found['input_wait_percent']} % of the time is input wait")
    return Found(rows, faults)


def inputs(settings: Settings) -> Found:
    """The input pipeline against a consumer that takes batches in no time."""
    from benchmarks import input_speed

    seconds = 0.3 if settings.dry_run else 5.0
    rows = input_speed.measure(Path(settings.store), seconds, repeats=1)
    return Found(rows, [])


def scaling(settings: Settings) -> Found:
    """Tokens/s of all distributors over the GPUs there are, equal rows for each GPU."""
    gpus = facts_with_gpu()["gpus"]
    counts = [2] if settings.dry_run else sorted({1, min(2, gpus), gpus})
    rows, faults = [], []
    for kind, count in [("one_device", 1), *((k, n) for n in counts for k in _distributors())]:
        folder = Path(settings.work, "scaling", f"{kind}-{count}")
        flags = {k: v for k, v in settings.flags.items() if k != "pretrain_batch_size"}
        given = [f"--run_dir={folder}", "--stage=pretrain", "--resume=never", *_as_flags(flags)]
        given += [f"--pretrain_batch_size={count * settings.flags['pretrain_batch_size']}"]
        given += [f"--pretrain_steps={settings.steps}", "--log_every_steps=1"]
        _run(_distributed(kind, count, given))
        report = json.loads((folder / "report.json").read_text())
        rows.append({"distributor": kind, "workers": count})
        rows[-1]["tokens_per_second"] = report["pretrain"]["tokens_per_second"]
        ratio = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
        rows[-1]["ratio to one device"] = round(ratio, 2)
        if ratio < 0.8 * count and not settings.dry_run:
            faults.append(f"{kind}: {count} GPUs are {ratio:.2f} times as fast as one")
    return Found(rows, faults)


def _distributors() -> list[str]:
    from launch.local import horovod

    return ["mirrored", "multi_worker", *(["horovod"] if horovod.is_installed() else [])]


def _distributed(kind: str, count: int, flags: Sequence[str]) -> list[str]:
    """Returns the command of `count` workers, or of one process for the first two kinds."""
    if kind in ("one_device", "mirrored"):
        return _trainer(f"--distributor={kind}", *flags)
    launcher = [sys.executable, "-m", "launch.main", "--platform=local", f"--workers={count}"]
    if kind == "horovod":
        return [*launcher, "--distributor=horovod", "--", *flags]
    return [*launcher, "--", "--distributor=multi_worker", *flags]


def imdb(settings: Settings) -> Found:
    """The whole of trainer/configs/imdb_cpu_20min.cfg, tested once."""
    folder = Path(settings.work, "imdb")
    began = time.monotonic()
    _run(_trainer("--flagfile=trainer/configs/imdb_cpu_20min.cfg", *_long(settings, folder)))
    report = json.loads((folder / "report.json").read_text())
    seconds = round(time.monotonic() - began)
    return Found(
        [
            {"start": start, "test error, %": error, "seconds": seconds}
            for start, error in report["test_error_percent"].items()
        ],
        [],
    )


def paper(settings: Settings) -> Found:
    """Ten minutes of trainer/configs/paper/imdb-sa-lstm.cfg, and how long all of it would take."""
    folder = Path(settings.work, "paper")
    command = _trainer("--flagfile=trainer/configs/paper/imdb-sa-lstm.cfg", "--log_every_steps=1")
    command += _long(settings, folder)
    seconds = 0 if settings.dry_run else 600
    began = time.monotonic()
    last = _run_until(command, folder, lambda _: time.monotonic() - began > seconds)
    config = json.loads((folder / "config.json").read_text())
    rate, steps = last["tokens_per_second"], config["pretrain_steps"]
    tokens = steps * config["pretrain_batch_size"] * gpu_paper.Size().tokens
    row = {"steps": last["step"], "of": steps, "loss, nats": last["loss"], "tokens/s": rate}
    row |= {"hours for all of pretraining, extrapolated": round(tokens / rate / 3600, 2)}
    return Found([row], [] if np.isfinite(last["loss"]) else ["the loss is not finite"])


def _long(settings: Settings, folder: Path) -> list[str]:
    """Returns flags of a long run; at smoke size it reads the small store."""
    flags = [f"--run_dir={folder}", *settings.source]
    if settings.dry_run:
        flags += ["--scale=smoke", f"--store={settings.store}", "--tokenizer=word"]
    return flags


def _trainer(*flags: str) -> list[str]:
    return [sys.executable, "-m", "trainer.main", *flags]


def _as_flags(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def _run(command: Sequence[str]) -> None:
    """Runs a command, whose lines go to the section's log.

    Raises:
        RuntimeError: It failed.
    """
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")


def _run_until(command: Sequence[str], folder: Path, done: Callable[[Row], bool]) -> Row:
    """Trains until a logged step is `done`, then sends TERM; returns the last logged step's line.

    Raises:
        RuntimeError: The run ended otherwise than by itself or by TERM.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            steps = _logged(folder)
            if steps and done(steps[-1]):
                process.send_signal(signal.SIGTERM)
                break
        print(process.stdout.read(), file=sys.stderr)
        code = process.wait()
    finally:
        process.kill()
        process.stdout.close()
    if code not in (0, 143):
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    return _logged(folder)[-1]


def _logged(folder: Path) -> list[Row]:
    """Returns the whole lines of steps in a run's metrics."""
    found = []
    for path in folder.glob("**/metrics.jsonl"):
        whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        found += [row for row in map(json.loads, whole) if "tokens_per_second" in row]
    return found


SECTIONS: dict[str, Callable[[Settings], Found]] = {
    each.__name__: each
    for each in (
        *(placement, equality, determinism, precisions, layer),
        *(step, inputs, scaling, imdb, paper),
    )
}


def main() -> None:
    name, settings, out = sys.argv[1:]
    found = SECTIONS[name](Settings(**json.loads(settings)))
    Path(out).write_text(json.dumps({"machine": facts_with_gpu(), **found._asdict()}))


if __name__ == "__main__":
    main()
