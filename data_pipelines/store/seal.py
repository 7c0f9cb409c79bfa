"""JSON objects that hold a checksum of their own: it finds damage, not forgery."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256_of_the_rest"


def with_seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` as JSON holds them (tuples are lists), with their checksum as the last."""
    held: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return held | {SEAL: _digest(held)}


def seal_fault(values: dict[str, Any]) -> str | None:
    """Takes the checksum out of `values`; returns what is wrong with it, None if it is right."""
    found = values.pop(SEAL, None)
    if found is None:
        return f"has no {SEAL!r}: it is damaged, or written by an older version of this program"
    try:
        matches = found == _digest(values)
    except RecursionError:
        matches = False
    return None if matches else f"is damaged: its {SEAL} does not match"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
