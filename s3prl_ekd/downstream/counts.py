"""How often a store had what was asked for: said in a run's log, and read there by ``superb``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"features: (\d+) hits, (\d+) misses, (\d+) excerpts, (\d+) bytes written")


@dataclass
class Counts:
    """Utterances read, computed and (random excerpts) computed without asking; bytes written."""

    hits: int = 0
    misses: int = 0
    excerpts: int = 0
    written: int = 0

    def __str__(self) -> str:
        return (
            f"features: {self.hits} hits, {self.misses} misses, {self.excerpts} excerpts, "
            f"{self.written} bytes written"
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[int, int, int, int]:
        return self.hits, self.misses, self.excerpts, self.written


def read_counts(text: str) -> Counts:
    """The sum of all that a log says."""
    total = Counts()
    for numbers in _LINE.findall(text):
        total += Counts(*map(int, numbers))
    return total
