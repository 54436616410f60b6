"""Shared by the tests of tools/study.py: metrics, teacher names, settings from arguments."""

from __future__ import annotations

import study as tool
from study_parts.cells import METRICS

PR, _, CER, SID, _ = METRICS
SINGLE = ["tiny_hubert", "tiny_robust_hubert", "tiny_wavlm"]


def parse(*argv: str):
    """The settings of a command line."""
    return tool.parse_setting(tool.make_parser().parse_args(["FOLDER", *argv]))
