"""Escapes control characters of untrusted text before a person sees it in a terminal."""

import re
from collections.abc import Callable
from typing import IO

# Controls but tab and line feed, what changes the direction of text or hides in it, and halves of
# surrogate pairs.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def printable(text: object) -> str:
    r"""Returns str(text) with unprintable characters written out, e.g. an escape as \x1b."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def write_to(file: IO[str]) -> Callable[[str], object]:
    """Returns a function that writes text to a file; to a terminal in printable form."""
    return (lambda text: file.write(printable(text))) if file.isatty() else file.write
