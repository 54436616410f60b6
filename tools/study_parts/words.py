"""Numbers and conditions in words."""

from __future__ import annotations

from .design import CLEAN
from .intervals import Estimate


def title(condition: str) -> str:
    """``clean``, ``esc10_snr5`` -> words."""
    if condition == CLEAN:
        return "Clean"
    noise, _, snr = condition.rpartition("_snr")
    return f"Under noise: {noise}, {snr} dB"


def shown(estimate: Estimate, sign: bool = False) -> str:
    """``45.1 [43.0, 47.2]``."""
    form = "+.1f" if sign else ".1f"
    low, high = format(estimate.low, form), format(estimate.high, form)
    return f"{format(estimate.value, form)} [{low}, {high}]"
