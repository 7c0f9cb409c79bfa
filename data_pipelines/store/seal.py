"""JSON objects that contain their own checksum, which finds damage, not forgery."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256_of_the_rest"


def with_seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` as JSON holds them (tuples become lists), followed by their checksum."""
    held: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return held | {SEAL: _digest(held)}


def seal_fault(values: dict[str, Any]) -> str | None:
    """Removes the checksum from `values`; returns its fault, or None if it is right."""
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
