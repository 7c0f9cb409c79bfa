"""The trainer on Horovod, under our launcher and under Horovod's own."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.integration.jobs import job
from tests.integration.programs import ENVIRONMENT, REPOSITORY, SMALL

WITHOUT_HOROVOD = 'import sys\nsys.modules["horovod"] = None\n'


@pytest.mark.horovod
@pytest.mark.slow("the whole job, twice; quick: test_training.py's")
def test_the_whole_job_by_horovodrun_and_by_our_launcher(small_store: Path, tmp_path: Path) -> None:
    steps = ("--pretrain_steps=20", "--finetune_steps=20", f"--store={small_store}")
    trainer = [sys.executable, "-m", "trainer.main", "--distributor=horovod", *SMALL, *steps]
    horovodrun = str(Path(sys.executable).with_name("horovodrun"))
    done = subprocess.run(
        [horovodrun, "-np", "2", "--gloo", *trainer, f"--run_dir={tmp_path}/theirs"],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with job("horovod", tmp_path, *steps, f"--run_dir={tmp_path}/ours") as running:
        assert running.finish() == 0, "\n".join(running.lines)
    for bundle in ("encoder/encoder.safetensors", "classifier/classifier.safetensors"):
        theirs, ours = (sorted((tmp_path / who).rglob(bundle)) for who in ("theirs", "ours"))
        assert [each.read_bytes() for each in theirs] == [each.read_bytes() for each in ours]
        assert theirs


@pytest.mark.horovod
@pytest.mark.slow("a job that TERM stops, three trainings; quick: test_training.py's")
def test_after_term_it_goes_on_and_ends_with_the_same_bits(
    small_store: Path, tmp_path: Path
) -> None:
    flags = ("--stage=pretrain", "--pretrain_steps=30", f"--store={small_store}")
    for name, stopped in (("whole", False), ("cut", True), ("cut", False)):
        run = (*flags, f"--run_dir={tmp_path}/{name}")
        with job("horovod", tmp_path / f"{name}-{stopped}", *run) as running:
            if stopped:
                running.wait_for("pretrain step 12/")
                running.process.send_signal(signal.SIGTERM)
            code = running.finish()
        assert code == (143 if stopped else 0), "\n".join(running.lines)
        assert any("state saved" in line for line in running.lines) == stopped
    assert any("resumed after step" in line for line in running.lines)
    encoders = [tmp_path / name / "encoder" / "encoder.safetensors" for name in ("whole", "cut")]
    assert encoders[0].read_bytes() == encoders[1].read_bytes()


@pytest.mark.parametrize("program", ["trainer.main", "launch.main"])
def test_without_horovod_one_line_says_how_to_get_it(tmp_path: Path, program: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_HOROVOD)
    flags = [] if program == "launch.main" else [f"--run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", program, "--distributor=horovod", *flags],
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "--distributor=horovod: Horovod is not installed; `make horovod` builds it" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["g++", "make", "patch", "mpicxx"])
def test_the_build_says_which_tool_is_missing(tmp_path: Path, missing: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "uname", "cat", "sed", "sha256sum", "cut", "nproc"):
        (tools / tool).symlink_to(shutil.which(tool))
    for tool in {"g++", "make", "patch", "mpicxx"} - {missing}:
        (tools / tool).write_text("#!/bin/sh\n")
        (tools / tool).chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/horovod_build/build.sh", sys.executable],
        cwd=REPOSITORY,
        env={"PATH": str(tools), "HOME": str(tmp_path), "HOROVOD_CPU_OPERATIONS": "MPI"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"there is no {missing} on this machine" in done.stderr
    assert not (tmp_path / ".cache").exists()


def test_the_build_runs_nothing_of_an_archive_with_another_hash(tmp_path: Path) -> None:
    ran = tmp_path / "setup.py ran"
    archives = tmp_path / "archives"
    archives.mkdir()
    (tmp_path / "setup.py").write_text(f"open({str(ran)!r}, 'w')")
    with tarfile.open(archives / "horovod-0.28.1.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "horovod-0.28.1/setup.py")
    python = tmp_path / "python"  # that installs nothing: the build's tools
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *" install "*) exit;; esac\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(archives), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "launch/horovod_build/build.sh", str(python)],
        cwd=REPOSITORY,
        env=os.environ | offline | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "is not there, or not the one that was tested" in done.stderr
    assert not ran.exists()
