"""The SUPERB score over PR, SID, ER and ASR, and published numbers of its public set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

# task -> its metric for FBANK and for the best system, per cent: the public set's anchors
ANCHORS: dict[str, tuple[float, float]] = {
    "pr": (82.01, 3.53),
    "sid": (20.058174, 90.3),
    "er": (48.23672168, 67.62),
    "asr": (23.18, 3.62),
}

LABEL = "SUPERB score (public anchors; only comparable on SUPERB's own corpora and recipes)"

Values = TypeVar("Values", float, np.ndarray)


def superb_score(metrics: Mapping[str, Values]) -> Values | None:
    """1000 · (s - FBANK) / (best - FBANK), averaged over the tasks; None where one is missing.

    Args:
        metrics: task -> its metric in per cent, a number or an array of them.
    """
    if not all(task in metrics for task in ANCHORS):
        return None
    parts = [
        1000 * (metrics[task] - fbank) / (best - fbank) for task, (fbank, best) in ANCHORS.items()
    ]
    return sum(parts[1:], parts[0]) / len(parts)


@dataclass(frozen=True)
class Published:
    """One row that others have published, on SUPERB's public set, frozen and without an LM."""

    name: str
    parameters: float | None  # millions
    pr: float
    sid: float
    er: float
    asr: float
    source: str

    @property
    def metrics(self) -> dict[str, float]:
        """Task -> its metric in per cent."""
        return {task: getattr(self, task) for task in ANCHORS}


def _anchor(name: str, parameters: float | None, which: int) -> Published:
    values = {task: round(pair[which], 2) for task, pair in ANCHORS.items()}
    return Published(name, parameters, **values, source="anchor of the public leaderboard's score")


PUBLISHED = (
    _anchor("FBANK", 0.0, 0),
    _anchor("best system", None, 1),
    Published("HuBERT Base", 94.70, 5.41, 81.42, 64.92, 6.42, "SUPERB, arXiv 2105.01051"),
    Published("WavLM Base+", 94.70, 3.92, 89.42, 68.65, 5.59, "WavLM, arXiv 2110.13900"),
    Published("DistilHuBERT", 23.49, 16.27, 73.54, 63.02, 13.37, "arXiv 2110.01900"),
    Published("FitHuBERT", 22.49, 13.32, 55.71, 59.82, 12.09, "arXiv 2207.00555"),
    Published("DPHuBERT", 23.59, 9.67, 76.83, 63.16, 10.47, "arXiv 2305.17651"),
    Published("DPWavLM", 23.59, 8.22, 82.11, 65.24, 10.19, "arXiv 2305.17651"),
    Published("LightHuBERT small", 27.0, 6.60, 69.70, 64.12, 8.33, "arXiv 2203.15610"),
    Published("ARMHuBERT-S", 22.39, 8.63, 63.76, 62.96, 10.82, "arXiv 2305.11685"),
    Published("STaRHuBERT", 22.31, 8.16, 77.58, 63.01, 9.35, "arXiv 2312.09040"),
)
