"""Splits by a hash of the text, so that duplicates never straddle two splits."""

import hashlib
from collections.abc import Mapping


def hash_split(text: str, percents: Mapping[str, int]) -> str:
    """Returns the split that a text belongs to.

    Args:
        text: the document; equal texts get equal splits, on every machine.
        percents: whole percents by split, adding up to 100. The order matters.

    Raises:
        ValueError: the percents do not add up to 100.
    """
    if sum(percents.values()) != 100:
        raise ValueError(f"percents add up to {sum(percents.values())}, not 100: {dict(percents)}")
    # "surrogatepass" because a str may hold lone surrogates, which plain UTF-8 refuses.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100
    for split, percent in percents.items():
        if bucket < percent:
            return split
        bucket -= percent
    raise AssertionError("unreachable: the buckets cover 0 .. 99")
