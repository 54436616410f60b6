"""Numbers and conditions in words."""

from __future__ import annotations

from s3prl_ekd.superb.report import condition_title
from s3prl_ekd.superb.report_text import with_interval

from .design import CLEAN
from .intervals import Estimate


def title(condition: str) -> str:
    """``clean``, ``esc10_snr5`` -> words."""
    if condition == CLEAN:
        return "Clean"
    return f"Under noise: {condition_title(condition)}"


def shown(estimate: Estimate, sign: bool = False) -> str:
    """``45.1 [43.0, 47.2]``."""
    return with_interval(estimate.value, estimate.low, estimate.high, digits=1, signed=sign)
