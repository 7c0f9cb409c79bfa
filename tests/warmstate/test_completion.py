import shutil
import subprocess

import pytest

from trainer.config import INITIAL_STATES
from warmstate import completion
from warmstate.command import COMMANDS


@pytest.fixture(scope="module")
def script() -> str:
    return completion.bash()


def completed(script: str, *words: str) -> list[str]:
    """Returns what bash offers for the last of the words that stand behind `warmstate`."""
    words = ("warmstate", *words)
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _warmstate;"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values(script: str) -> None:
    assert completed(script, "") == list(COMMANDS)
    assert completed(script, "pre") == ["prepare", "pretrain", "predict"]
    assert completed(script, "finetune", "--initial_s") == ["--initial_state="]
    assert completed(script, "finetune", "--initial_state", "=") == list(INITIAL_STATES)
    assert completed(script, "finetune", "--initial_state", "=", "le") == ["learned"]
    assert completed(script, "pretrain", "--finetune_") == []
    assert completed(script, "prepare", "--so") == ["--source="]
    assert completed(script, "completion", "") == ["bash", "zsh", "fish"]
    assert "--flagfile=" in completed(script, "launch", "--")
    assert "/etc/passwd" in completed(script, "pretrain", "--flagfile", "=", "/etc/pass")


def test_a_script_has_every_flag() -> None:
    scripts = {shell: make() for shell, make in completion.SHELLS.items()}
    for name in COMMANDS:
        for flag in completion._flags(name):
            assert f"--{flag.name}=" in scripts["bash"] and f"--{flag.name}=[" in scripts["zsh"]
            assert f" -l {flag.name} " in scripts["fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_the_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    made = completion.SHELLS[shell]()
    subprocess.run([shell, "-n"], input=made, text=True, check=True)
