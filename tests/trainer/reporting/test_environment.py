"""What a report says of the machine and of the code."""

import subprocess
from pathlib import Path

from trainer.reporting import environment


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) is None
    git(tmp_path, "init")
    assert environment.commit(tmp_path) is None  # nothing has been committed
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    assert environment.commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert environment.commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "+"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert environment.commit(inside) is None  # a package in somebody's repository is not its code
