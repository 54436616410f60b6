"""The type of a compatibility shim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shim:
    """Replacement for a feature that s3prl 0.4.18 uses and newer packages have removed.

    Attributes:
        name: the feature's dotted name in Python.
        needed_by: the lines of s3prl 0.4.18 that use it, as ``file:line`` below ``s3prl/``.
        since: the release that removed it.
        summary: the replacement, in one line.
        missing: whether the feature is missing. It tests behaviour, not version numbers, has no
            side effects, and returns False once ``apply`` has run.
        apply: install the replacement.
    """

    name: str
    needed_by: tuple[str, ...]
    since: str
    summary: str
    missing: Callable[[], bool]
    apply: Callable[[], None]
