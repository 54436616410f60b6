"""One missing thing and its replacement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shim:
    """Something that s3prl 0.4.18 uses and that newer packages no longer have.

    Attributes:
        name: what is missing, as one would write it in Python.
        needed_by: the lines of s3prl 0.4.18 that need it, ``file:line``, below ``s3prl/``.
        since: the release that took it away.
        summary: what stands in for it, in one line.
        missing: whether it is missing here and now. Looks at behaviour rather than version
            numbers, changes nothing, and is False once ``apply`` has run.
        apply: put the replacement in place.
    """

    name: str
    needed_by: tuple[str, ...]
    since: str
    summary: str
    missing: Callable[[], bool]
    apply: Callable[[], None]
