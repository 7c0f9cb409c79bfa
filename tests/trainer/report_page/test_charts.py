import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report_page import charts
from trainer.report_page.charts import Series
from trainer.report_page.statistics import Interval

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30))
def test_any_line_is_drawn_inside_its_frame(points: list[tuple[float, float]]) -> None:
    points.sort()
    series = Series("a", [x for x, _ in points], [y for _, y in points], "warm")
    drawn = charts.line_chart("t", [series], "x", "y")
    (path,) = re.findall(r'class="line" d="M([^"]*)"', drawn)
    places = np.array([pair.split() for pair in path.split("L")], float)
    assert len(places) == len(points)
    assert places[:, 0].min() >= charts.LEFT - 0.1
    assert places[:, 0].max() <= charts.WIDTH - charts.RIGHT + 0.1
    assert places[:, 1].min() >= charts.TOP - 0.1
    assert places[:, 1].max() <= charts.HEIGHT - charts.BOTTOM + 0.1


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_and_inside(low: float, size: float) -> None:
    found = charts.ticks(low, low + size)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-6 * size <= tick <= low + size * (1 + 1e-6) for tick in found)


def test_a_long_line_is_thinned_to_means() -> None:
    long = Series("a", range(100_000), np.arange(100_000) * 2.0, "warm")
    short = charts.thinned(long)
    assert len(short.x) == charts.MAX_POINTS
    np.testing.assert_allclose(short.y, 2 * np.array(short.x))
    assert np.mean(short.y) == pytest.approx(99_999)


def test_words_and_numbers_stand_for_the_picture() -> None:
    series = Series("Warm <b>", [1, 2], [30.0, 20.5], "warm")
    drawn = charts.line_chart("Error", [series], "step", "% wrong")
    assert "from 30 to 20.5, lowest 20.5, highest 30" in drawn
    assert "<td>20.5</td>" in drawn and "<b>" not in drawn
    rows = [("Warm", Interval(20.0, 18.0, 22.0), "warm")]
    assert "Warm: 20.0, 18.0 to 22.0" in charts.interval_chart("Errors", rows, "%")


def test_a_heat_map_has_a_cell_for_each_unit() -> None:
    values = np.linspace(-1, 1, 100)
    drawn = charts.heat_map("h", values, 1.0)
    assert drawn.count("M") == 100
    assert "level-minus-6" in drawn and "level-plus-6" in drawn
    assert "level-plus-0" in charts.heat_map("h", np.zeros(3), 0.0)
