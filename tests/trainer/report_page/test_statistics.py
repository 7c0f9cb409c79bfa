import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from trainer.report_page import statistics


def test_wilson_interval_against_published_figures() -> None:
    # Newcombe 1998, table I, method 3: 81/263 and 0/20.
    assert statistics.proportion(81, 263) == pytest.approx((0.3080, 0.2553, 0.3662), abs=1e-4)
    assert statistics.proportion(0, 20) == pytest.approx((0, 0, 0.1611), abs=1e-4)


@given(st.integers(1, 10_000), st.data())
def test_an_interval_holds_its_share(total: int, data: st.DataObject) -> None:
    found = statistics.proportion(data.draw(st.integers(0, total)), total)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_unpaired_difference_against_published_figures() -> None:
    # Newcombe 1998 (two proportions), table II, method 10: 56/70 - 48/80.
    first, second = statistics.proportion(56, 70), statistics.proportion(48, 80)
    found = statistics.unpaired_difference(first, second)
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_paired_difference_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        hard = random.random(400) < 0.2  # what fools both
        first = hard | (random.random(400) < 0.15)
        second = hard | (random.random(400) < 0.05)
        found = statistics.paired_difference(first, second)
        covered += found.low <= 0.8 * 0.10 <= found.high
    assert 455 <= covered <= 492
    assert statistics.paired_difference(first, first) == (0, 0, 0)


def test_the_mean_of_runs_has_students_interval() -> None:
    found = statistics.mean_of_runs([4.7, 2.3, 3.4])
    # By hand: mean 3.4667, deviation 1.2014, t(2) = 4.303.
    assert found == pytest.approx((3.4667, 0.4819, 6.4514), abs=1e-3)
    many = statistics.mean_of_runs([0.0, 2.0] * 20)  # deviation 1.0127, t(39) = 2.0227
    assert many == pytest.approx((1, 0.6761, 1.3239), abs=1e-4)


def test_confusion_counts_labels_by_row() -> None:
    counts = statistics.confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_precision_recall_and_f1_are_those_of_scikit_learn() -> None:
    labels, predicted = np.random.default_rng(0).integers(0, 4, (2, 50))  # class 4 is never seen
    found = statistics.by_class(statistics.confusion(labels, predicted, 5))
    expected = precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=0)
    np.testing.assert_allclose(found, np.stack(expected[:3], axis=1))


def test_calibration_of_a_classifier_that_is_right_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    share = random.uniform(0, 1, 100_000)
    is_right = random.random(100_000) < share
    honest = np.where(share < 0.5, ~is_right, is_right)
    assert statistics.calibration(np.maximum(share, 1 - share), honest, 2).error < 0.01
    # One that says 0.9 and is right half of the time is off by 0.4.
    found = statistics.calibration(np.full(1000, 0.9), np.arange(1000) % 2 == 0, 2)
    assert found.error == pytest.approx(0.4)
    assert found.documents.sum() == found.documents.max() == 1000
    assert np.isnan(found.accuracy[0])


def test_the_principal_plane_is_the_one_that_points_lie_in() -> None:
    random = np.random.default_rng(0)
    plane = np.linalg.qr(random.normal(size=(9, 9)))[0][:2]
    flat = random.normal(size=(50, 2)) * [5, 1]
    found = statistics.principal_plane(flat @ plane + 3)
    assert found.explained.sum() == pytest.approx(1)
    gaps = np.linalg.norm(flat[:, None] - flat, axis=-1)
    np.testing.assert_allclose(
        np.linalg.norm(found.points[:, None] - found.points, axis=-1), gaps, atol=1e-9
    )
    assert statistics.principal_plane(np.zeros((4, 1))).points.tolist() == [[0, 0]] * 4
