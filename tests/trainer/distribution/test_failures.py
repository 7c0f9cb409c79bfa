import pytest
import tensorflow as tf

from trainer.distribution.failures import lost_peer

HOROVOD = (
    "Graph execution error:\n\nHorovod has been shut down. This was caused by\n\t [[{{node sum}}]]"
)


class HorovodInternalError(RuntimeError):
    """Of the same name as Horovod's own, which need not be installed."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (tf.errors.UnavailableError(None, None, "a\nConnection reset by peer\nb"), "reset by peer"),
        (tf.errors.DeadlineExceededError(None, None, "Collective timeout"), "Collective timeout"),
        (
            tf.errors.DeadlineExceededError(None, None, "Timed out\n [[{{node Collective}}]] [Op]"),
            "Timed out",
        ),
        (tf.errors.UnavailableError(None, None, ""), "UnavailableError"),
        (tf.errors.UnknownError(None, None, HOROVOD), "Horovod has been shut down"),
        (HorovodInternalError("Horovod has been shut down"), "shut down"),
    ],
)
def test_a_lost_peer(error: Exception, says: str) -> None:
    assert says in lost_peer(error)
    assert "{{" not in lost_peer(error)
    assert "\n" not in lost_peer(error) and "caused" not in lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("the loss of step 3 is nan"),
        tf.errors.UnknownError(None, None, "disk"),
        tf.errors.InvalidArgumentError(None, None, "Horovod: shapes differ"),
        ValueError("peer"),
    ],
)
def test_other_errors_are_ours(error: Exception) -> None:
    assert lost_peer(error) is None
