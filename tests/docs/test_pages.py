"""Every code block of a page runs: in order, in one namespace, in an empty folder."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_blocks(page: str) -> dict:
    """Runs the page's blocks, an error naming its line; returns the names that they define."""
    text = (REPOSITORY / "docs" / page).read_text()
    names: dict = {}
    for block in BLOCK.finditer(text):
        lines_before = text[: block.start(1)].count("\n")
        code = compile("\n" * lines_before + block.group(1), str(page), "exec")
        exec(code, names)
    assert names, f"{page} has no python blocks"
    return names


def test_initialising_lstm_state(
    tmp_path: Path, encoder_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(encoder_bundle, tmp_path / "runs" / "a" / "encoder")
    monkeypatch.chdir(tmp_path)
    found = run_blocks("initialising-lstm-state.md")
    # The short answer: the classifier starts from what the encoder ends with.
    x = found["x"]
    encoder, reader = (found["classifier"].get_layer(name) for name in ("encoder", "reader"))
    _, h, c = encoder(x)
    probe = found["keras"].Model(found["inputs"], reader.output)
    np.testing.assert_allclose(probe(x), reader(x, initial_state=[h, c]), atol=1e-6)
    assert np.abs(probe(x) - reader(x)).max() > 1e-3
    # What the stock and our ways say of the same encoder is the same.
    ours = found["states"].from_encoder(found["plain"], x)[0]
    np.testing.assert_allclose(ours, [found["mean_h"], found["mean_c"]], atol=1e-6)
    lstm = found["learned"].layers[-2]
    assert np.abs(found["h0"].kernel[0] - found["mean_h"]).max() == 0
    np.testing.assert_allclose(
        found["keras"].Model(found["inputs"], lstm.output)(x),
        lstm(x, initial_state=[np.tile(part, (256, 1)) for part in ours]),
        atol=1e-6,
    )
