"""`make gpu-check` without a GPU: sections run, are kept, and the page says what has run."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_paper
from benchmarks.gpu_sections import SECTIONS, Settings


def test_the_page_is_that_of_the_results() -> None:
    dry_run = json.loads(gpu_check.DRY_RUN.read_text())
    expected = gpu_check.page(gpu_check.kept(gpu_check.RESULTS), dry_run)
    assert gpu_check.PAGE.read_text() == expected, "run python -m benchmarks.gpu_check --render"
    assert dry_run["sections"].keys() == SECTIONS.keys()


def test_the_first_line_says_what_ran_on_what() -> None:
    on_gpu = {"machine": {"gpus": 2, "gpu_name": "H100"}, "seconds": 3, "faults": [], "rows": []}
    machine = {"cpu": "a CPU", "cores": 2, "tensorflow": "2"}
    dry_run = {"machine": machine, "sections": {"layer": {"seconds": 1, "faults": ["slow"]}}}
    first = gpu_check.first_line({"layer": on_gpu}, dry_run)
    assert first.startswith("Ran on 2 x H100: layer. Not run on a GPU: placement, equality")
    first = gpu_check.first_line({}, dry_run)
    assert first.startswith("**Nothing on this page has run on a GPU.** 1 of 10 sections")
    assert "(a CPU, 2 cores, TensorFlow 2), with 1 faults" in first
    assert "neither" in gpu_check.first_line({}, None)


def test_a_section_that_failed_runs_again_and_one_that_is_done_does_not(
    small_store: Path, tmp_path: Path, forks: None
) -> None:
    wrong = Settings(True, str(small_store), str(tmp_path), ["--no_such_flag"])
    log = tmp_path / "imdb.log"
    said = gpu_check.run_section("imdb", wrong, tmp_path)
    assert said == f"imdb: FAILED (exit code 1), see {log}"
    assert "--no_such_flag" in log.read_text() and gpu_check.kept(tmp_path) == {}

    right = dataclasses.replace(wrong, source=[])
    assert gpu_check.run_section("inputs", right, tmp_path).endswith(" s")
    found = gpu_check.kept(tmp_path)["inputs"]
    assert [row["rows a worker"] for row in found["rows"]] == [128, 16] and found["faults"] == []
    assert all(row["shapes"] >= 1 for row in found["rows"])
    assert "128" in gpu_check.section_text("inputs", found)
    assert gpu_check.run_section("inputs", wrong, tmp_path) == "inputs: kept"


def test_a_gpu_check_without_a_gpu_does_not_pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "sees_gpu", lambda: False)
    with pytest.raises(SystemExit, match="gpu-check was NOT run: TensorFlow sees no GPU"):
        gpu_check.run_all(argparse.Namespace(dry_run_on_cpu=False), Path("not written"))


def test_time_in_kernels_counts_once(tmp_path: Path) -> None:
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    from benchmarks.gpu_probe import busy_seconds

    space = xplane_pb2.XSpace()
    gpu, host = (space.planes.add(name=name) for name in ("/device:GPU:0", "/host:CPU"))
    for plane, begin_ns, spans in (
        (gpu, 0, [(0, 4), (2, 4), (10, 1)]),
        (gpu, 3, [(0, 5)]),
        (host, 0, [(0, 1000)]),
    ):
        line = plane.lines.add(timestamp_ns=begin_ns)
        for offset, duration in spans:
            line.events.add(offset_ps=1000 * offset, duration_ps=1000 * duration)
    (tmp_path / "a.xplane.pb").write_bytes(space.SerializeToString())
    assert busy_seconds(tmp_path, "/device:GPU") == pytest.approx(9e-9)  # 0 to 8 and 10 to 11


def test_the_estimate_is_consistent() -> None:
    size = gpu_paper.Size()
    of_run = 500_000 * gpu_paper.useful_flop(size)
    assert of_run == pytest.approx(1.0e18, rel=0.3)  # what imdb-sa-lstm.cfg says it costs
    for row in gpu_paper.rows():
        parts = ("recurrence, ms", "large products, ms", "tables and rest, ms")
        assert sum(row[part] for part in parts) == pytest.approx(row["step, ms"], abs=0.2)
        assert 0 < row["MFU, %"] < 100 * gpu_paper.PRODUCT_SHARE
    assert gpu_paper.peak_flops("NVIDIA H100 80GB HBM3", "mixed_bfloat16") == 989.4e12
    assert gpu_paper.peak_flops("Tesla T4", "float32") == 8.1e12
    assert gpu_paper.peak_flops("another", "float32") is None


@pytest.mark.slow("all sections of the dry run, minutes; quick: one of them; CI: gpu.yml")
def test_the_dry_run_ends_without_a_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry_run_on_cpu"]
    done = subprocess.run(
        [*command, f"--work={tmp_path}"], stdout=subprocess.PIPE, text=True, timeout=3000
    )
    logs = "".join(log.read_text() for log in tmp_path.glob("dry_run/*.log"))
    assert done.returncode == 0 and "FAULT" not in done.stdout, done.stdout + logs
    assert (tmp_path / "gpu.md").read_text().startswith("**Nothing on this page has run on a GPU")
