"""Counts and reports the documents that cannot be used."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

REPORTED_EXAMPLES = 20


class BadExamples:
    """Counts bad examples by reason, and keeps the first ones."""

    def __init__(self) -> None:
        self.first: list[tuple[str, str]] = []
        self.reasons: Counter[str] = Counter()

    def add(self, where: str, why: str) -> None:
        """Adds one."""
        if len(self.first) < REPORTED_EXAMPLES:
            self.first.append((where, why))
        # Values are left out, so that like reasons are counted together.
        self.reasons[re.sub(r"'.*?'|(?<![\w-])\d[\da-fA-Fx]*", "...", why)] += 1

    def merge(self, first: Iterable[tuple[str, str]], reasons: Mapping[str, int]) -> None:
        """Adds those of a part: its first ones, and its counts by reason."""
        self.first += list(first)[: REPORTED_EXAMPLES - len(self.first)]
        self.reasons.update(reasons)

    def __len__(self) -> int:
        return self.reasons.total()

    def by_count(self) -> list[tuple[str, int]]:
        """Returns the most frequent reasons with their counts, at most REPORTED_EXAMPLES."""
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ordered[:REPORTED_EXAMPLES]

    def report(self, allowed: int) -> str:
        """Returns lines about the first ones and the most frequent reasons."""
        fine = len(self) <= allowed
        verdict = "so they are left out" if fine else "correct the data or allow more"
        lines = [
            f"{len(self):,} bad examples; --max_bad_examples={allowed} allows {allowed}: {verdict}",
            *(f"  {where}: {why}" for where, why in self.first),
        ]
        if len(self) > len(self.first):
            lines.append(f"  and {len(self) - len(self.first):,} more")
        lines += [f"{count:,} times: {why}" for why, count in self.by_count()]
        return "\n".join(lines)
