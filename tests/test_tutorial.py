"""Every command of docs/tutorial.md, in order, as a newcomer would give it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\S+) (tested|printed)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """Returns language, "tested" or "printed", and text of the page's blocks that say so."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_all_steps() -> None:
    commands = "".join(text for _, what, text in blocks() if what == "tested")
    for name in ("prepare", "pretrain", "finetune", "evaluate", "predict", "export"):
        assert f"warmstate {name} " in commands


@pytest.mark.slow("all commands of the tutorial, minutes")
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, words in (("warmstate", "-m warmstate"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    folder = tmp_path / "work"
    folder.mkdir()
    printed = ""
    for language, what, text in blocks():
        if what == "printed":
            for line in text.splitlines():
                assert line in printed, printed
            continue
        command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=290
        )
        assert done.returncode == 0, (text, done.stdout, done.stderr)
        printed = done.stdout
    assert "b'login'" in printed
    report = json.loads((folder / "runs/tickets/evaluate/report.json").read_text())["test"]
    assert report["error_percent"] < 5 and report["documents"] > 30
    rows = [json.loads(line) for line in (folder / "predicted.jsonl").read_text().splitlines()]
    assert len(rows) == 600
    assert sum(row["predicted"] == row["label"] for row in rows) > 570
