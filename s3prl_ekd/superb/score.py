"""SUPERB scores, over PR, SID, ER and ASR or over all tasks, and published results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..downstream.tasks import COLUMNS, DEFAULT_TASKS, TASKS

# column -> metric of FBANK and of the best system, per cent: the anchors of the public set's score
ANCHORS = {name: column.metric.anchors for name, column in COLUMNS.items() if column.metric.anchors}

LABEL = "SUPERB score (public anchors; only comparable on SUPERB's own corpora and recipes)"

Values = TypeVar("Values", float, np.ndarray)


def superb_score(
    metrics: Mapping[str, Values], tasks: Sequence[str] = DEFAULT_TASKS
) -> Values | None:
    """Average 1000 · (metric - FBANK) / (best - FBANK) over a task's metrics, then over the tasks.

    Args:
        metrics: column -> metric in per cent, a number or an array.
        tasks: by default PR, SID, ER and ASR.

    Returns:
        None if a metric is missing.
    """
    columns = [tuple(TASKS[task].columns) for task in tasks]
    if not all(name in metrics for names in columns for name in names):
        return None

    def score(name: str) -> Values:
        fbank, best = ANCHORS[name]
        return 1000 * (metrics[name] - fbank) / (best - fbank)

    return _mean([_mean([score(name) for name in names]) for names in columns])


def _mean(values: Sequence[Values]) -> Values:
    return sum(values[1:], values[0]) / len(values)


@dataclass(frozen=True)
class PublishedResult:
    """A published model's results on SUPERB's public set: frozen upstream, no language model."""

    name: str
    parameters: float | None  # millions
    pr: float
    sid: float
    er: float
    asr: float
    source: str

    @property
    def metrics(self) -> dict[str, float]:
        """Task -> metric in per cent."""
        return {task: getattr(self, task) for task in DEFAULT_TASKS}


_ANCHOR = "anchor of the public leaderboard's score"
PUBLISHED = (
    PublishedResult("FBANK", 0.0, 82.01, 20.06, 48.24, 23.18, _ANCHOR),
    PublishedResult("best system", None, 3.53, 90.3, 67.62, 3.62, _ANCHOR),
    PublishedResult("HuBERT Base", 94.70, 5.41, 81.42, 64.92, 6.42, "SUPERB, arXiv 2105.01051"),
    PublishedResult("WavLM Base+", 94.70, 3.92, 89.42, 68.65, 5.59, "WavLM, arXiv 2110.13900"),
    PublishedResult("DistilHuBERT", 23.49, 16.27, 73.54, 63.02, 13.37, "arXiv 2110.01900"),
    PublishedResult("FitHuBERT", 22.49, 13.32, 55.71, 59.82, 12.09, "arXiv 2207.00555"),
    PublishedResult("DPHuBERT", 23.59, 9.67, 76.83, 63.16, 10.47, "arXiv 2305.17651"),
    PublishedResult("DPWavLM", 23.59, 8.22, 82.11, 65.24, 10.19, "arXiv 2305.17651"),
    PublishedResult("LightHuBERT small", 27.0, 6.60, 69.70, 64.12, 8.33, "arXiv 2203.15610"),
    PublishedResult("ARMHuBERT-S", 22.39, 8.63, 63.76, 62.96, 10.82, "arXiv 2305.11685"),
    PublishedResult("STaRHuBERT", 22.31, 8.16, 77.58, 63.01, 9.35, "arXiv 2312.09040"),
)
