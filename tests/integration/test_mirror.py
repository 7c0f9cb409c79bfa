"""Runs that lose their folder, killed in the middle of an upload, continue from --mirror."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.integration.jobs import Job
from tests.integration.programs import ENVIRONMENT, REPOSITORY, command, metrics, train
from tests.processes import ended
from tests.s3_server import Server, needs_s3, s3_server

FLAGS = ("--stage=pretrain", "--pretrain_steps=24", "--checkpoint_every_steps=4")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with s3_server() as running:
        for name, value in running.environment.items():
            monkeypatch.setitem(ENVIRONMENT, name, value)
        yield running


def assert_same(whole: Path, again: Path) -> None:
    assert metrics(whole) == metrics(again)
    for path in sorted(whole.glob("*/*.safetensors")):
        assert path.read_bytes() == (again / path.relative_to(whole)).read_bytes(), path


@needs_s3
@pytest.mark.parametrize(
    "workers",
    [1, pytest.param(2, marks=pytest.mark.slow("three trainings of two workers; quick: of one"))],
)
def test_a_run_that_is_killed_in_an_upload_continues_elsewhere_with_the_same_bits(
    small_store: Path, tmp_path: Path, server: Server, workers: int
) -> None:
    flags = (*FLAGS, f"--store={small_store}")
    train(workers, *flags, f"--run_dir={tmp_path}/whole")
    flags += ("--mirror=s3://bucket/run",)
    server.hold("PUT", "/objects/", 12)  # among those of the second checkpoint or later
    process = forked.Popen(
        command(workers, *flags, f"--run_dir={tmp_path}/lost"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with ended(process, 300):
        assert "/objects/" in server.wait_until_held()
        process.kill()  # a launcher's workers die with it
        process.wait()
    server.work()
    printed = train(workers, *flags, f"--run_dir={tmp_path}/again")
    assert "mirror: fetched" in printed and "pretrain: resumed after step" in printed
    assert_same(tmp_path / "whole", tmp_path / "again")
    # Another number of workers fetches it, too; all is done.
    printed = train(3 - workers, *flags, f"--run_dir={tmp_path}/third")
    assert "pretrain: resumed after step 24" in printed


@needs_s3
@pytest.mark.slow("two trainings; quick: the Mirror alone in tests/trainer/test_mirror.py")
def test_term_leaves_its_checkpoint_at_the_store_and_frozen_encoders_are_broadcast(
    small_store: Path, tmp_path: Path, server: Server
) -> None:
    """All stages, with a frozen encoder that only the first worker's folder has."""
    flags = (f"--store={small_store}", "--stage=all", "--starts=warm", "--train=state+bias")
    flags += ("--pretrain_steps=8", "--finetune_steps=16", "--mirror=s3://bucket/run")
    words = command(2, *flags, f"--run_dir={tmp_path}/lost")
    begin = words.index("--")
    process = forked.Popen(
        [*words[:begin], "--grace_seconds=60", *words[begin:]],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with ended(process, 300):
        running = Job(process)
        running.wait_for("finetune step 12/")
        running.process.terminate()
        assert running.finish() == 143
    stopped = next(line for line in running.lines if "state saved" in line)
    printed = train(2, *flags, f"--run_dir={tmp_path}/again")
    step = stopped.partition("after step ")[2].partition(";")[0]
    assert f"finetune: resumed after step {step}" in printed
    assert json.loads((tmp_path / "again" / "report.json").read_text())["test_error_percent"]
