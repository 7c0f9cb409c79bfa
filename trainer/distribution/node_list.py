"""Expands lists of hosts and of counts in SLURM's notation."""

import itertools
import re

from data_pipelines.errors import InputError

MAX_HOSTS = 100_000  # a typo such as n[1-1000000000] must not exhaust the memory
_ITEM = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x([1-9]\d*)\))?")


def expand_hosts(text: str, name: str) -> list[str]:
    """Returns the hosts in a list such as "n[01-03,7],gpu1" or "w-[0-2].job:2222".

    Numbers keep the leading zeros of the range's first. Of several brackets in an item the last one
    varies fastest, as in `scontrol show hostnames` (SLURM's "hostlist expressions").

    Args:
        name: The variable with the list, for the message.

    Raises:
        InputError: The list is malformed.
    """
    hosts: list[str] = []
    for item in _split(text, name):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        choices = [_numbers(part, text, name) if i % 2 else [part] for i, part in enumerate(parts)]
        hosts += map("".join, itertools.islice(itertools.product(*choices), MAX_HOSTS + 1))
        if len(hosts) > MAX_HOSTS:
            raise InputError(f"{name}={text!r} names more than {MAX_HOSTS:,} hosts")
    return hosts


def expand_counts(text: str, name: str) -> list[int]:
    """Returns the numbers in a list such as "2(x3),1": 2, 2, 2, 1.

    Raises:
        InputError: The list is malformed.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = _COUNT.fullmatch(item)
        times = int(match[2] or 1) if match else 0
        if not match or times + len(counts) > MAX_HOSTS:
            raise InputError(f"{name}={text!r} must be numbers such as 2(x3),1")
        counts += [int(match[1])] * times
    return counts


def _split(text: str, name: str) -> list[str]:
    items, end = [], 0
    while match := _ITEM.match(text, end):
        items.append(match[0])
        end = match.end()
        if end == len(text):
            return items
        if text[end] != ",":
            break
        end += 1
    raise InputError(f"{name}={text!r} must be a list of hosts such as node[01-03,7],gpu1")


def _numbers(ranges: str, text: str, name: str) -> list[str]:
    numbers: list[str] = []
    for each in ranges.split(","):
        match = _RANGE.fullmatch(each)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if match is None or last < first or last - first >= MAX_HOSTS:
            raise InputError(f"{name}={text!r}: [{ranges}] must hold ranges such as 01-03,7")
        numbers += [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    return numbers
