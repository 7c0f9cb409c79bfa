"""Makes every kind of write on a real disk that is too small, by one page more each time.

    python -m tests.faults.full_disk

Each write must leave the old content or the new one, and succeed once there is room. Needs the
right to mount; it mounts in a namespace that nobody else sees.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.faults.everywhere import in_child
from tests.faults.writes import WRITES

PAGE_BYTES = 4096
NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS


def value_of(found: dict[str, Any], where: str) -> str:
    """Returns what a child returned; raises AssertionError if it raised."""
    assert "value" in found, f"{where}: {found.get('error', 'killed')}"
    return str(found["value"])


def mount(options: str, folder: Path) -> None:
    """Mounts a disk in memory, or changes it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def fill(name: str, top: Path) -> int:
    """Makes one kind of write on ever larger disks, until it fits; returns how often it failed."""
    write, template, disk = WRITES[name], top / "template", top / "disk"
    template.mkdir()
    disk.mkdir()
    value_of(in_child(write.before, template), name)
    failures, pages, old = 0, 1, ""
    while True:
        mount(f"size={pages * PAGE_BYTES}", disk)
        work = disk / "work"
        try:
            shutil.copytree(template, work)
            old = old or value_of(in_child(write.read, work), name)
        except (OSError, shutil.Error):  # there is not even room for what was there
            subprocess.run(["umount", disk], check=True)
            pages += 1
            continue
        where = f"{name}, {pages} pages"
        done = in_child(write.write, work)
        left = value_of(in_child(write.read, work), where) if "value" not in done else ""
        mount("remount,size=1g", disk)
        value_of(in_child(write.write, work), where)
        new = value_of(in_child(write.read, work), where)
        subprocess.run(["umount", disk], check=True)
        if "value" in done:
            return failures
        assert done["kind"] in ("InputError", "OSError"), f"{where}: {done['error']}"
        assert left in (old, new), f"{where}: found {left:.200}"
        failures += 1
        pages += 1


def main() -> int:
    """Returns the exit code: 77 if it may not mount."""
    if ctypes.CDLL(None).unshare(NEW_NAMESPACE) or os.system("mount --make-rprivate / 2>/dev/null"):
        print("a namespace of mounts cannot be made here")
        return 77
    for name in WRITES:
        with tempfile.TemporaryDirectory() as top:
            print(f"{name}: failed on {fill(name, Path(top))} disks", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
