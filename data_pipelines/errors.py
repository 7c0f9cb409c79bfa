"""The exceptions for mistakes that the user can fix, and for what a restart may fix."""

from collections.abc import Sequence

# Exit codes of all programs. One that starts another acts on them.
USAGE_EXIT_CODE = 2  # a mistake that repeating the command does not mend
LOST_WORKER_EXIT_CODE = 75  # EX_TEMPFAIL: the same command may succeed later
PREEMPTED_EXIT_CODE = 143  # TERM came, and the state is saved; what a shell reports for TERM


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
