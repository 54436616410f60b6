"""Range checks of settings."""

from __future__ import annotations

import math


def check_range(settings: object, low: float, high: float, *names: str) -> None:
    """Raise ValueError for a setting outside ``low`` to ``high``; None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            limits = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name} must be {limits}, got {value}")
