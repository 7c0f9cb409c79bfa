import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.reporting import live
from trainer.reporting.console import COLUMNS_VARIABLE, Console
from trainer.reporting.live import LiveStatus


@given(st.text(max_size=30), st.lists(st.text(max_size=20)), st.floats(0, 1), st.integers(1, 200))
def test_a_line_never_wraps_unless_its_head_alone_does(
    head: str, parts: list[str], share: float, columns: int
) -> None:
    assert len(live.fitted(head, parts, share, columns)) <= max(columns, len(head) + 1)


def test_what_matters_most_stays_in_a_narrow_terminal() -> None:
    parts = ["loss 1.5", "ETA 3s", "9 tokens/s"]
    assert live.fitted("a 1/2", parts, 0.5, 80) == (
        f"a 1/2 {'━' * 12}{'╌' * 12} loss 1.5 · ETA 3s · 9 tokens/s"
    )
    assert live.fitted("a 1/2", parts, 0.5, 26) == "a 1/2 loss 1.5 · ETA 3s"


def test_the_line_says_how_the_last_steps_were(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(stream, {COLUMNS_VARIABLE: "120"})
    status = LiveStatus(console, "pretrain", steps=1000, steps_per_epoch=250)
    assert status.is_on
    monkeypatch.setattr(live, "REDRAW_SECONDS", 0)
    for step in range(1, 31):  # the first ten are no longer recent
        old = step <= 10
        status.count(step, 9.0 if old else 2.0, 500, 1.0 if old else 0.3, 0.1, 185)
    said = stream.getvalue().replace("\x1b[K", "").split("\r")[-2]
    assert said.startswith("pretrain 30/1,000 ━")
    assert said.endswith("loss 2.000 · ETA 3m05s · 1,667 tokens/s · epoch 0.12 · input wait 25 %")
    status.note("evaluating")
    assert "evaluating · loss 2.000" in stream.getvalue()


def test_it_is_redrawn_ten_times_a_second_at_most() -> None:
    stream = io.StringIO()
    status = LiveStatus(Console(stream, {COLUMNS_VARIABLE: "120"}), "a", 10_000, 1)
    for step in range(1, 10_000):
        status.count(step, 1.0, 1, 0.001, 0, 1)
    assert stream.getvalue().count("\r") < 50


def test_without_a_terminal_it_does_nothing() -> None:
    stream = io.StringIO()
    status = LiveStatus(Console(stream, {}), "a", 10, 1)
    status.count(1, 1.0, 1, 1.0, 0, 1)
    status.note("evaluating")
    assert not status.is_on and stream.getvalue() == ""
    assert not LiveStatus(print, "a", 10, 1).is_on
