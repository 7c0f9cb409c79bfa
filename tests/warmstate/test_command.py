import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from trainer.config import Config
from trainer.inference import predict, serve
from trainer.stages import finetune, finetune_batches, finetune_loss, init_embeddings, pretrain
from warmstate import command
from warmstate.command import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]


def warmstate(*words: str) -> tuple[int, str, str]:
    """Runs the console script as a process; returns the exit code, stdout and stderr."""
    command = [sys.executable, "-m", "warmstate", *words]
    done = forked.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_names_every_command_in_its_group(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert f"\n  {name} " in printed and entry.summary in printed
        assert f"  warmstate {entry.examples[0]}" in printed
    assert command.main([]) == 2
    assert capsys.readouterr().out == printed
    assert all(len(line) <= 100 for line in printed.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_its_flags(name: str) -> None:
    code, printed, said = warmstate(name, "--help")
    assert (code, said) == (0, "")
    assert printed.startswith(f"warmstate {name}: ")
    expected = {
        "prepare": ("--vocab_size=int", "--source=str"),
        "pretrain": ("Pretraining:", "--pretrain_steps=int", "--units=int"),
        "finetune": ("Fine-tuning:", "--initial_state=zero|mean|learned|encode"),
        "predict": ("--explain=true|false", "--classifier=str"),
        "replay": ("--run_dir=str", "--step=int"),
        "launch": ("--workers=int", "Kubernetes:", "--overlay=indexed-job|jobset|"),
    }
    for words in expected.get(name, ()):
        assert words in printed
    absent = {"pretrain": "--finetune_", "finetune": "--pretrain_steps", "predict": "--units"}
    # As flags of its own; the help of others may name them.
    assert f"\n  {absent.get(name, '--no_such_flag')}" not in printed


OF_JOINT_TRAINING = (pretrain.loss_sum, pretrain.make_encoder)
CODE = {
    "pretrain": (pretrain, init_embeddings),
    "finetune": (
        finetune, finetune_batches, finetune_loss, init_embeddings, *OF_JOINT_TRAINING,
    ),
    "predict": (predict,),
    "serve": (serve,),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_help_of_a_stage_has_every_flag_that_its_code_reads(name: str) -> None:
    text = "".join(map(inspect.getsource, CODE[name]))
    fields = {item.name for item in dataclasses.fields(Config)}
    read = fields & set(re.findall(r"\bconfig\.(\w+)", text))
    shown = {flag.name for flag in command.flags_of(name)}
    assert len(read) > 3 and read <= shown, read - shown


def test_help_of_replay_has_what_may_have_moved_since_the_run() -> None:
    shown = {flag.name for flag in command.flags_of("replay")}
    assert {"store", "encoder", "backward_encoder"} <= shown


def test_help_and_completion_leave_tensorflow_out() -> None:
    program = (
        "import sys; from warmstate.command import main;"
        "[main(w) for w in (['--help'], ['pretrain', '--help'], ['completion', 'bash'])]"
    )
    # runpy leaves by SystemExit, so what is imported is looked at as the process ends.
    watched = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {program}"
    command = [sys.executable, "-c", watched]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    code, printed = done.returncode, done.stdout
    modules = printed.splitlines()[-1].split()
    assert code == 0 and "warmstate.flag_tables" in modules and "complete -o" in printed
    assert not {"tensorflow", "keras", "pandas"} & set(modules)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("pretrian",), 2, "'pretrian' is not a command of warmstate; did you mean pretrain?"),
        (("help", "prepair"), 2, "did you mean prepare?"),
        (("pretrain", "--pretrain_step=3"), 2, "did you mean --pretrain_steps"),
        (("prepare", "--sorce=x"), 2, "did you mean --source?"),
        (("launch", "--workrs=2", "--", "--stage=pretrain"), 2, "did you mean --workers?"),
        (("predict", "--classifier=/no", "a text"), 2, "is no classifier bundle"),
        (("completion", "bsh"), 2, "did you mean bash?"),
        (("doctor", "--all"), 2, "takes no flags"),
    ],
)
def test_what_is_wrong_is_said_with_the_nearest_right(
    words: tuple[str, ...], code: int, says: str
) -> None:
    found, _, said = warmstate(*words)
    assert (found, says in said, "Traceback" in said) == (code, True, False), said


def test_flags_override_a_flagfile_and_the_command_its_stage(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text("--stage=all\n--units=0\n--embedding_dim=0\n")
    code, _, said = warmstate("pretrain", f"--flagfile={tmp_path}/a.cfg", "--units=4")
    assert code == 2
    assert "--embedding_dim=0 must be at least 1" in said and "--units" not in said
    (tmp_path / "b.cfg").write_text("--stage=all\n")
    _, _, said = warmstate("finetune", f"--flagfile={tmp_path}/b.cfg", f"--run_dir={tmp_path}")
    assert "--init_weights=encoder needs an encoder" in said


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("warmstate 0.")
