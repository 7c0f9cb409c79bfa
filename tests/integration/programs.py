"""Runs the trainer as users do: as processes, alone or under the launcher."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import forked

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}

# Small enough for seconds, with all that can go wrong: dropout, sampling, uneven batches.
SMALL = (
    "--vocab_size=1000",
    "--embedding_dim=8",
    "--units=16",  # as many as the compiled loops need: their graphs are traced faster
    "--sampled_softmax=64",
    "--pretrain_batch_size=12",
    "--pretrain_max_tokens=24",
    "--pretrain_dropout=0.1",
    "--pretrain_evaluate_documents=20",
    "--pretrain_learning_rate=0.01",
    "--mean_state_documents=30",
    "--finetune_batch_size=12",
    "--finetune_max_tokens=24",
    "--finetune_evaluate_every_steps=15",
    "--finetune_learning_rate=0.01",
    "--log_every_steps=1",
    "--checkpoint_every_steps=10",
)


def command(workers: int, *flags: str) -> list[str]:
    """Returns the command that trains on `workers` processes."""
    if workers == 1:
        return [sys.executable, "-u", "-m", "trainer.main", *SMALL, *flags]
    launcher = [sys.executable, "-u", "-m", "launch.main", f"--workers={workers}"]
    return [*launcher, "--", *SMALL, *flags]


def train(workers: int, *flags: str, **environment: str) -> str:
    """Trains to the end; returns what was printed."""
    done = run(workers, *flags, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(workers: int, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the trainer; returns its exit code and output."""
    return forked.run(
        command(workers, *flags),
        cwd=REPOSITORY,
        env=ENVIRONMENT | environment,
        text=True,
        capture_output=True,
        timeout=300,
    )


def train_until(
    text: str, with_signal: signal.Signals, workers: int, *flags: str, **environment: str
) -> int:
    """Starts to train, sends a signal once a line holds `text`; returns the exit code."""
    process = forked.Popen(
        command(workers, *flags),
        cwd=REPOSITORY,
        env=ENVIRONMENT | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if text in line:
                process.send_signal(with_signal)
                break
        else:
            raise AssertionError(f"{text!r} was never printed:\n{''.join(printed)}")
        process.stdout.read()
        return process.wait(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def metrics(folder: Path, name: str = "loss") -> dict[int, float]:
    """Returns the metric `name` by step."""
    lines: Sequence[dict] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return {line["step"]: line[name] for line in lines if name in line}
