"""The type of options such as ``--seed``."""

from __future__ import annotations

from argparse import ArgumentTypeError

LARGEST = 2**32 - 1  # of NumPy's generator


def seed_number(text: str) -> int:
    """The seed that ``text`` gives, for argparse. Raises ArgumentTypeError for other texts."""
    if not text.isdecimal() or int(text) > LARGEST:
        raise ArgumentTypeError(f"a seed must be 0 to {LARGEST}, got {text[:40]}")
    return int(text)
