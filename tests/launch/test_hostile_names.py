"""Names that a shell or Kubernetes would expand, through everything that the launcher writes.

What is written is executed, in a separate folder: nothing of a name may run, and every program
must get the words that were given.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.kubernetes import manifests
from launch.kubernetes.options import OVERLAYS, KubernetesOptions
from launch.local import workers
from launch.slurm import script
from launch.slurm.script import SlurmOptions
from tests.integration.pod_runner import _expand

REPOSITORY = Path(__file__).parents[2]
HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    # Without the blanks that sbatch does not take.
    "$(>pwned)",
    "`>pwned`",
    "a;>pwned;",
    "a;touch pwned;",
    "a&&touch pwned",
    "a|touch pwned",
    "a>pwned",
    "$HOME",
    "$$",
    "$$(HOME)",
    "$(HOME)",
    "~",
    "*",
    "{a,b}",
    "a'b",
    'a"b',
    "a b",
    "a\\b",
    "a\nb",
    "#a",
    "-n",
]
FLAGS = [f"--run_dir={word}" for word in HOSTILE]
TELL = "import json, sys; json.dump(sys.argv[1:], open('told', 'w'))"


def told(folder: Path) -> list[str]:
    return json.loads((folder / "told").read_text())


def test_commands_of_this_machine(tmp_path: Path) -> None:
    (line,) = workers.shell_commands([sys.executable, "-c", TELL, *FLAGS], 1)
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    assert told(tmp_path) == FLAGS
    assert [path.name for path in tmp_path.iterdir()] == ["told"]


@pytest.mark.parametrize("name", [word for word in HOSTILE if "/" not in word])
def test_slurm_s_script_in_a_folder_of_that_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    launched = subprocess.run(
        [sys.executable, "-m", "launch.main", "--platform=slurm", "--dry_run", "--", *FLAGS],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    if launched.returncode == 2:  # sbatch reads these in its own way
        assert any(sign in name for sign in " \n'\"\\"), launched.stderr
        assert launched.stderr.startswith("launch: --platform=slurm: blanks, quotes, % or")
        return
    assert launched.stdout == script.script(
        [sys.executable, "-u", "-m", "trainer.main", *FLAGS], SlurmOptions(), folder
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    for program, body in {
        "srun": f'{sys.executable} -c {shlex.quote(TELL)} "$@"',
        "scontrol": ":",
    }.items():
        (programs / program).write_text(f"#!/bin/bash\n{body}\n")
        (programs / program).chmod(0o755)
    subprocess.run(
        ["bash", "-c", launched.stdout],
        cwd=folder,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        check=True,
    )
    words = told(folder)
    assert words[-len(FLAGS) :] == FLAGS
    assert f"--output={folder}/slurm-logs/%j-worker-%t.log" in words
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "scontrol",
        "srun",
        "told",
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_arguments_of_pods(overlay: str) -> None:
    elastic = {"elastic": True, "min_workers": 1, "max_workers": 2} if overlay == "elastic" else {}
    options = KubernetesOptions(overlay=overlay, workers=2, **elastic)
    text = json.dumps(manifests.render(options, FLAGS))
    (arguments,) = {tuple(each) for each in _lists(json.loads(text)) if len(each) == len(FLAGS)}
    environment = {"HOME": "/tmp", "touch pwned": "no"}
    assert [_expand(word, environment) for word in arguments] == FLAGS


def _lists(value: object) -> list[list[str]]:
    """Returns the lists of texts in a document."""
    if isinstance(value, dict):
        return [each for item in value.values() for each in _lists(item)]
    if isinstance(value, list):
        if value and all(isinstance(item, str) for item in value):
            return [value]
        return [each for item in value for each in _lists(item)]
    return []
