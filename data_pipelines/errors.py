"""The one exception for mistakes that the user can fix."""


class InputError(ValueError):
    """A user's mistake: a flag, a file or a folder that is wrong.

    `str(error)` is one or more lines; each line is one fault and names the flag or file to change.
    Programs print it and exit with code 2.
    """
