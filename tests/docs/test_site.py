"""The documentation site builds without a warning, and holds what it should."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow("builds the documentation site; CI does so in tests.yml")


def test_the_site_builds_without_a_warning() -> None:
    command = [sys.executable, "-m", "docs_site.build"]
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    site = REPOSITORY / "build" / "site"
    flags = (site / "reference" / "flags.html").read_text()
    assert "--initial_state" in flags and "--units" in flags
    assert "reset_state" in (site / "reference" / "trainer.models.html").read_text()
    assert "fonts.googleapis" not in (site / "index.html").read_text()
    assert (site / "images" / "architecture.svg").exists()
