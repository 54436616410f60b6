"""The environment variables that torchrun sets."""

from __future__ import annotations

import os


def is_distributed() -> bool:
    """Whether torchrun has started more than one process."""
    return _number("WORLD_SIZE", 1) > 1


def rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return _number("RANK", 0) if is_distributed() else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
