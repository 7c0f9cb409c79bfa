"""The launcher's command line, run as a user runs it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TRAINER = """
import sys
print(sys.argv[1:])
if "--bad" in sys.argv:
    print("--bad: no such flag", file=sys.stderr)
    sys.exit(2)
"""


def launch(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.main", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.fixture
def trainer_folder(tmp_path):
    """A working folder with a small `trainer.main` of its own."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    (tmp_path / "trainer" / "main.py").write_text(TRAINER)
    return tmp_path


def test_all_faults_at_once():
    launcher_flags = ["--platform=mars", "--workers=0", "--grace_seconds=nan", "--stage=all", "x"]
    launcher_flags += ["--distributor=mpi", "--max_restarts=-1"]
    result = launch(*launcher_flags, "--", "--learning_rate=1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "launch: --stage is not a flag of this program; trainer flags come after --",
        "launch: x is not a flag; trainer flags come after --",
        "launch: --platform=mars is not one of local, slurm, k8s",
        "launch: --workers=0 must be at least 1",
        "launch: --distributor=mpi is not one of auto, horovod",
        "launch: --max_restarts=-1 must be at least 0",
        "launch: --grace_seconds=nan is not a finite number",
    ]


def test_all_faults_of_an_action_at_once():
    result = launch("status", "a/b", "--follow", "--workers=2", "--namespace=n", "--queue=q")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "launch: status a/b: no job can have that name",
        "launch: --workers=2: status has no such flag",
        "launch: --follow: status has no such flag",
        "launch: --namespace=n: needs --platform=k8s",
        "launch: --queue=q: status has no such flag",
    ]
    (line,) = launch("cancel").stderr.splitlines()
    assert line == "launch: cancel: must be cancel NAME, of one job"
    (line,) = launch("logs", "a", "b", "--platform=k8s").stderr.splitlines()
    assert line == "launch: logs a b: must be logs NAME, of one job"
    (line,) = launch("logs", "a", "--platform=mars").stderr.splitlines()
    assert line == "launch: --platform=mars is not one of local, slurm, k8s"


def test_what_means_nothing_here_is_refused():
    result = launch("--wait", "--follow", "--name=../a")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "launch: --wait: needs --platform=slurm or --platform=k8s",
        "launch: --follow: needs --platform=slurm or --platform=k8s",
        "launch: --name=../a: must be letters, digits, . - and _",
    ]


@pytest.mark.parametrize("flag", ["--dry_run=maybe", "--workers=two", "--grace_seconds=-1"])
def test_one_fault_is_one_line(flag):
    result = launch(flag)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert flag in line


@pytest.mark.parametrize("platform", ["local", "slurm", "k8s"])
@pytest.mark.parametrize("number", ["+4", "1_000", "\uff14", "0x4", " 4", "4.0", "9" * 30])
def test_a_number_is_read_as_it_is_checked(platform, number):
    result = launch(f"--platform={platform}", f"--workers={number}", "--dry_run")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"launch: --workers={number} is not an integer\n"


def test_more_workers_than_the_machine_can_start_are_one_line(trainer_folder):
    limited = [sys.executable, "-m", "launch.main", "--workers=400"]
    result = subprocess.run(
        ["bash", "-c", 'ulimit -n 128; exec "$@"', "bash", *limited],
        cwd=trainer_folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (2, "")
    assert result.stdout == (
        "launch: --workers=400: cannot be started: Too many open files; start fewer\n"
    )


@pytest.mark.parametrize("program", ["launch.main", "data_pipelines.prepare", "trainer.main"])
def test_help_starts_with_what_the_program_does_and_lists_every_flag(program):
    command = [sys.executable, "-m", program, "--help"]
    printed = subprocess.check_output(command, cwd=REPOSITORY, text=True)
    expected = {
        "launch.main": ("Starts trainer processes", "workers", "overlay", "time_limit"),
        "data_pipelines.prepare": ("Tokenizes text", "source", "min_count", "out"),
        "trainer.main": ("warmstate: pretrain", "stage", "units", "port"),
    }
    start, *names = expected[program]
    assert printed.startswith(start)
    assert all(f"\n  --{name}=" in printed for name in names)
    assert printed.endswith("Flags after it override it.\n")


def test_a_flag_without_its_value():
    result = launch("--workers")
    assert result.returncode == 2
    assert result.stderr == "launch: Missing value for flag --workers\n"


def test_dry_run_prints_commands_that_a_shell_can_run(trainer_folder):
    before = os.times()
    result = launch("--workers=2", "--dry_run", "--", "--name=a b", "--dry_run", "--workers=9")
    after = os.times()
    # The processor's seconds, which other programs do not lengthen.
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 2
    assert result.returncode == 0
    titles, commands = result.stdout.splitlines()[::2], result.stdout.splitlines()[1::2]
    assert titles == ["# worker 0", "# worker 1"]
    for index, command in enumerate(commands):
        assert f'"index": {index}' in command
        printed = subprocess.check_output(command, shell=True, cwd=trainer_folder, text=True)
        assert printed == "['--name=a b', '--dry_run', '--workers=9']\n"


@pytest.mark.parametrize("flags", [[], ["--"]])
def test_without_trainer_flags_the_trainer_has_its_defaults(trainer_folder, flags):
    result = launch(*flags, folder=trainer_folder)
    assert (result.returncode, result.stdout) == (0, "[]\n")


def test_a_configuration_error_of_the_trainer_stays_2(trainer_folder):
    result = launch("--workers=2", "--platform", "local", "--", "--bad", folder=trainer_folder)
    assert result.returncode == 2
    assert "--bad: no such flag" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("exited with code 2")


def test_the_launcher_imports_no_tensors():
    imports = "import sys, launch.main; print(*sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", imports], cwd=REPOSITORY, text=True)
    assert "launch.local.workers" in printed.split()
    assert {"tensorflow", "trainer", "numpy", "yaml", "horovod"}.isdisjoint(printed.split())


@pytest.mark.horovod
def test_horovod_s_workers_get_its_variables_and_its_distributor(trainer_folder):
    show = (
        "import os\nprint({k: v for k, v in os.environ.items() if k[:7] in ('HOROVOD', 'TF_CONF')})"
    )
    with open(trainer_folder / "trainer" / "main.py", "a") as file:
        file.write(show)
    launcher = ["--workers=2", "--distributor=horovod"]
    result = launch(*launcher, "--", "--seed=1", folder=trainer_folder)
    assert result.returncode == 0, result.stdout
    for rank in range(2):
        own = [line for line in result.stdout.splitlines() if line.startswith(f"[worker {rank}]")]
        assert "['--distributor=horovod', '--seed=1']" in own[0]
        environ = ast.literal_eval(own[1].partition("] ")[2])
        assert "TF_CONFIG" not in environ
        assert (environ["HOROVOD_RANK"], environ["HOROVOD_SIZE"]) == (str(rank), "2")
        assert environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "127.0.0.1"
        assert int(environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]) > 0
