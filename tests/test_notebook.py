"""The notebook runs from top to bottom, and says what it promises."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "notebooks" / "initialise_lstm_state.ipynb"


def test_it_is_short_and_stored_without_outputs() -> None:
    cells = [c for c in nbformat.read(PAGE, as_version=4).cells if c.cell_type == "code"]
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 25
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow("runs the notebook")
def test_the_lstm_starts_from_the_encoder_s_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(PAGE, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert "started from the encoder's state: True" in printed
    assert float(printed.split("trained it on by up to ")[1].split()[0]) > 0
