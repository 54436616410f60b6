"""What torchrun tells its processes, by their environment."""

from __future__ import annotations

import os


def several() -> bool:
    """Whether this is one of several processes."""
    return _number("WORLD_SIZE", 1) > 1


def rank() -> int:
    """The number of this process among all of the run; 0 where it is alone."""
    return _number("RANK", 0) if several() else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
