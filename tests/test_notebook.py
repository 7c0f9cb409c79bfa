"""The notebooks run from top to bottom, and say what they promise."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "docs" / "notebooks"


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.ipynb")), ids=lambda page: page.stem)
def test_it_is_short_and_stored_without_outputs(page: Path) -> None:
    cells = [c for c in nbformat.read(page, as_version=4).cells if c.cell_type == "code"]
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 25
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def printed_by(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns what the notebook prints, run in an empty folder."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


@pytest.mark.slow("runs the notebook")
def test_the_lstm_starts_from_the_encoder_s_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = printed_by("initialise_lstm_state", tmp_path, monkeypatch)
    assert "started from the encoder's state: True" in printed
    assert float(printed.split("trained it on by up to ")[1].split()[0]) > 0


@pytest.mark.slow("runs the notebook")
def test_a_session_answers_as_reading_all_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = printed_by("sessions", tmp_path, monkeypatch)
    assert float(printed.split("difference from reading all again: ")[1].split()[0]) < 1e-5
    assert "9 words read" in printed


@pytest.mark.slow("runs the notebook")
def test_a_state_from_context_predicts_better_than_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = printed_by("context_state", tmp_path, monkeypatch)
    zeros, context = (
        float(printed.split(f"from {s}: ")[1].split()[0]) for s in ("zeros", "context")
    )
    assert context < 0.3 * zeros


@pytest.mark.slow("runs the notebook")
def test_two_tasks_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = printed_by("task_bank", tmp_path, monkeypatch)
    task, classifier = (
        int(part.split()[0]) for part in printed.split("of a task: ")[1].split(":", 1)
    )
    assert 50 * task < classifier
    assert "as the classifier alone: True" in printed
