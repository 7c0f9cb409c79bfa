"""The page of figures is what the last measurement printed."""

from benchmarks import all as benchmarks


def test_the_page_is_that_of_the_results() -> None:
    assert benchmarks.PAGE.read_text() == benchmarks.page(), "run python -m benchmarks.all --render"
