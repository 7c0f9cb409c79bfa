"""Runs the demo on a terminal, draws what it shows half-way through fine-tuning, keeps its figures.

    python -m benchmarks.demo

Writes docs/images/demo-terminal.svg, in the colours of the reader's theme, and
benchmarks/results/demo.json: errors, times, and the largest memory of all its processes together.
The demo's output follows on standard output.
"""

import json
import os
import re
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.machine import facts
from benchmarks.processes import descendants_megabytes
from tests.terminal import Screen, run_on_terminal
from trainer.safe_files import replace_text

PICTURE = Path("docs/images/demo-terminal.svg")
COMMAND = "-m launch.main --platform=local --workers=2 -- --flagfile=trainer/configs/demo.cfg"
RESULT, REPORT = Path("benchmarks/results/demo.json"), Path("runs/demo/report.json")
SECONDS_BETWEEN_LOOKS = 5.0
COLUMNS, LINE_HEIGHT, CHARACTER_WIDTH, MARGIN = 112, 20, 7.83, 20
STYLE = """
text {
  font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  fill: #1c2128; white-space: pre;
}
rect { fill: #ffffff } .command { fill: #6a737d } .live { fill: #0b6e66 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } rect { fill: #0d1117 } .command { fill: #8b949e } .live { fill: #57cfc0 }
}
"""


def picture(lines: list[str]) -> str:
    """Returns an SVG of a terminal's lines; the last one is the live line."""
    wrapped = [line[i : i + COLUMNS] for line in lines for i in range(0, len(line), COLUMNS)]
    shown = ["$ make demo", *wrapped]
    width = round(2 * MARGIN + COLUMNS * CHARACTER_WIDTH)
    height = 2 * MARGIN + LINE_HEIGHT * len(shown)
    kinds = ["command", *[""] * (len(wrapped) - 1), "live"]
    heights = [MARGIN + LINE_HEIGHT * (i + 0.75) for i in range(len(shown))]
    texts = [
        f'<text class="{kind}" x="{MARGIN}" y="{y:g}">{escape(line)}</text>'
        for line, kind, y in zip(shown, kinds, heights, strict=True)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            f'<style>{STYLE}</style><rect width="{width}" height="{height}" rx="8"/>',
            *texts,
            "</svg>\n",
        ]
    )


def figures(report: dict[str, Any], megabytes: float) -> dict[str, Any]:
    """Returns what is kept of the demo's report."""
    return {
        "command": "make demo",
        "labels": report["labels"],
        "seconds": {part: report[part]["seconds"] for part in ("pretrain", "warm", "scratch")},
        "wall_seconds": report["wall_seconds"],
        "peak_megabytes": round(megabytes),
        "test_documents": report["test"]["warm"]["documents"],
        "machine": facts(),
    }


def main() -> int:
    """Runs the demo; returns its exit code."""
    captured: list[str] = []
    megabytes, looked = 0.0, 0.0

    def look(raw: str) -> None:
        nonlocal megabytes, looked
        if time.monotonic() > looked + SECONDS_BETWEEN_LOOKS:  # a look costs tens of milliseconds
            looked, megabytes = time.monotonic(), max(megabytes, descendants_megabytes(os.getpid()))
        live = re.search(r"finetune (\d+)/\d+ [^\n]*$", raw[-500:])
        if not captured and live and int(live[1]) >= 180:
            screen = Screen(COLUMNS)
            screen.feed(raw)
            captured.extend(line for line in screen.lines if line)

    code, raw = run_on_terminal([sys.executable, *COMMAND.split()], COLUMNS, each=look)
    print(raw)
    if code == 0:
        PICTURE.write_text(picture(captured))
        kept = figures(json.loads(REPORT.read_text()), megabytes)
        replace_text(RESULT, json.dumps(kept, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
