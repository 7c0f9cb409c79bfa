"""The exceptions for mistakes that the user can fix, and for what a restart may fix."""

from collections.abc import Sequence


class InputError(ValueError):
    """A wrong flag, file or folder.

    Each line of `str(error)` is a fault and names the flag or file to change. Programs print it and
    exit with code 2.
    """


def raise_if(faults: Sequence[str]) -> None:
    """Raises InputError with all the faults, if there are any."""
    if faults:
        raise InputError("\n".join(faults))


class TransientError(InputError):
    """A fault of this process or moment, such as too many open files.

    The same command may succeed when it is started again; the trainer exits with 75.
    """
