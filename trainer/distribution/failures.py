"""Recognises errors caused by a lost peer, of every distributor."""

import re

import tensorflow as tf

from trainer.distribution import watchdog


def lost_peer(error: Exception) -> str | None:
    """Returns a sentence about the peer if a lost or hung peer caused `error`, else None.

    It names hung workers, else it is the main sentence of `error`.
    """
    message = getattr(error, "message", None) or str(error)
    by_tensorflow = isinstance(error, tf.errors.UnavailableError | tf.errors.DeadlineExceededError)
    # The lost peer's replacement was there before its loss was seen.
    restarted = isinstance(error, tf.errors.AbortedError) and "different incarnation" in message
    if not (by_tensorflow or restarted or _by_horovod(error, message)):
        return None
    if said := watchdog.suspicion():
        return said
    # Names of graph nodes and functions, {{...}}, do not help the user.
    lines = [re.sub(r"\[\[.*|\{\{.*?\}\}", "", line).strip() for line in message.splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if any(word in line for word in _TELLING)]
    return (telling or lines or [type(error).__name__])[-1].split(". ")[0]


_TELLING = ("peer", "Collective", "Horovod", "not started", "not answered")


def _by_horovod(error: Exception, message: str) -> bool:
    # Horovod raises UnknownError inside a tf.function and HorovodInternalError outside. The latter
    # is compared by name: most runs have no Horovod to import.
    if type(error).__name__ == "HorovodInternalError":
        return True
    return isinstance(error, tf.errors.UnknownError) and "Horovod" in message
