"""The exception for mistakes that the user can fix."""


class InputError(ValueError):
    """A wrong flag, file or folder.

    Each line of `str(error)` is a fault and names the flag or file to change. Programs print it and
    exit with code 2.
    """
