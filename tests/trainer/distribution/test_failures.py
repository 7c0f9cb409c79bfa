import pytest
import tensorflow as tf

from trainer.distribution.failures import lost_peer

HOROVOD = (
    "Graph execution error:\n\nHorovod has been shut down. This was caused by\n\t [[{{node sum}}]]"
)
# As a pod said whose peer was killed and at once replaced.
RESTARTED = (
    "Collective ops is aborted by: Error reported from /job:worker/task:1: /job:worker/replica:0/"
    "task:1 unexpectedly tried to connect with a different incarnation. It has likely restarted.\n"
    "The error could be from a previous operation. Restart your program to reset.\n"
    "\t [[{{node CollectiveReduceV2}}]] [Op:__inference__run_shards_6536]"
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
        (tf.errors.AbortedError(None, None, RESTARTED), "with a different incarnation"),
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
        tf.errors.AbortedError(None, None, "Collective ops is aborted by: out of memory"),
        tf.errors.InvalidArgumentError(None, None, "Horovod: shapes differ"),
        ValueError("peer"),
    ],
)
def test_other_errors_are_ours(error: Exception) -> None:
    assert lost_peer(error) is None
