"""What the tests of the study's command share: metrics, names, and a setting as typed."""

from __future__ import annotations

import study as tool
from study_parts.cells import METRICS

PR, _, CER, SID, _ = METRICS
SINGLE = ["tiny_hubert", "tiny_robust_hubert", "tiny_wavlm"]


def typed(*words: str):
    """The setting of a command line."""
    return tool.parse_setting(tool.make_parser().parse_args(["FOLDER", *words]))
