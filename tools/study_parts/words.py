"""Format estimates and test conditions."""

from __future__ import annotations

from s3prl_ekd.superb.report import condition_title
from s3prl_ekd.superb.report_text import with_interval

from .design import CLEAN
from .intervals import Estimate


def condition_heading(condition: str) -> str:
    """Heading of a test condition such as ``clean`` or ``esc10_snr5``."""
    if condition == CLEAN:
        return "Clean"
    return f"Under noise: {condition_title(condition)}"


def format_estimate(estimate: Estimate, sign: bool = False) -> str:
    """Format an estimate as ``45.1 [43.0, 47.2]``."""
    return with_interval(estimate.value, estimate.low, estimate.high, digits=1, signed=sign)
