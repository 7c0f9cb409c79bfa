"""The wheel, built and installed where no checkout can be imported."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow("builds and installs the wheel; CI does so in wheel.yml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=240)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the interpreter of an environment that has the wheel, and these dependencies.

    They are taken from the environment of the tests, whose path files are not read: its link to the
    checkout is one of those.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [interpreter, "-m", "pip", "install", "--no-deps", "--no-index", "-I", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return interpreter


def run(python: Path, folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TF_CONFIG"))}
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_what_the_programs_read_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (
        "trainer/configs/demo.cfg",
        "trainer/report_page/page.css",
        "trainer/report_page/page.js",
        "launch/k8s/base/job.yaml",
        "launch/k8s/overlays/mpijob/mpijob.yaml",
        "launch/k8s/cluster/priority-class.yaml",
        "launch/k8s/monitoring/dashboard.json",
    ):
        assert path in names, path
    tops = {name.split("/")[0] for name in names}
    foreign = tops - {"data_pipelines", "launch", "trainer", "warmstate"}
    assert all(re.fullmatch(r"warmstate-[\d.]+\.dist-info", top) for top in foreign), foreign
    configs = {str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("trainer/configs/**/*.cfg")}
    assert configs <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_asks_for_what_it_imports(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(
        next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    )
    asked = re.findall(rb"^Requires-Dist: ([\w\-]+)[^;\n]*$", metadata, re.M)
    assert {b"tensorflow", b"keras", b"numpy", b"safetensors", b"PyYAML"} <= set(asked)


def test_the_demo_runs_without_a_clone(python: Path, tmp_path: Path, small_store: Path) -> None:
    flags = (f"--store={small_store}", "--scale=smoke", "--run_dir=run", "--label_counts=")
    printed = run(python, tmp_path, "-m", "warmstate", "demo", *flags)
    assert "warm start" in printed and "from scratch" in printed
    assert (tmp_path / "run" / "report.html").exists()


def test_the_programs_run_outside_of_the_checkout(
    python: Path, tmp_path: Path, small_store: Path
) -> None:
    where = run(python, tmp_path, "-c", "import trainer, launch; print(trainer.__file__)")
    assert str(REPOSITORY) not in where
    assert "--initial_state" in run(python, tmp_path, "-m", "trainer.main", "--help")
    manifests = run(
        python, tmp_path, "-m", "launch.main", "--platform=k8s", "--workers=2", "--dry_run",
        "--", "--run_dir=/data/runs/a",
    )  # fmt: skip
    assert "kind: Job" in manifests
    sizes = (
        "--embedding_dim=8", "--units=12", "--sampled_softmax=64", "--pretrain_batch_size=12",
        "--pretrain_max_tokens=24", "--pretrain_steps=2", "--pretrain_evaluate_documents=20",
        "--mean_state_documents=30", "--finetune_steps=2", "--finetune_max_tokens=24",
    )  # fmt: skip
    printed = run(
        python, tmp_path, "-m", "trainer.main", f"--store={small_store}", "--run_dir=run", *sizes
    )
    assert "warm start" in printed and (tmp_path / "run" / "report.html").exists()
    again = run(python, tmp_path, "-m", "trainer.report_page.html", "run", "--out=again.html")
    assert again == "report: again.html\n"
