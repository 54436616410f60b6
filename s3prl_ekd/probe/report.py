"""Results of probes as a table, as JSON, and as a picture by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..superb.bootstrap import interval, resampled_rates
from ..superb.report_plots import COLOURS, LINES, add_legend
from ..system.figures import new_figure, png
from .measure import CLEAN, ProbeScore

RESAMPLES = 2000
Results = Mapping[str, Sequence[ProbeScore]]  # by upstream


def accuracy_interval(score: ProbeScore) -> tuple[float, float]:
    """95 % interval of an accuracy over other test utterances (bootstrap)."""
    low, high = interval(_resampled(score))
    return low, high


def difference_interval(a: ProbeScore, b: ProbeScore) -> tuple[float, float]:
    """95 % interval of ``a`` less ``b`` on the same utterances, in points."""
    return interval(_resampled(a) - _resampled(b))


def _resampled(score: ProbeScore) -> np.ndarray:
    return 100 - resampled_rates(score.errors[None], score.counts, score.names, RESAMPLES)[0]


def columns(results: Results) -> list[tuple[str, str]]:
    """(score, condition) of all results, in their order."""
    return list(
        dict.fromkeys((s.score, s.condition) for scores in results.values() for s in scores)
    )


def title(score: str, condition: str) -> str:
    """Head of a column."""
    return score if condition == CLEAN else f"{score}, {condition}"


def table(results: Results) -> list[list[str]]:
    """Accuracies in per cent with intervals; then each upstream's difference to the first one."""
    heads = columns(results)
    rows = [["upstream", *(title(*head) for head in heads)]]
    for name, scores in results.items():
        by_head = {(s.score, s.condition): s for s in scores}
        cells = []
        for head in heads:
            score = by_head[head]
            low, high = accuracy_interval(score)
            cells.append(f"{score.accuracy:.1f} [{low:.1f}, {high:.1f}]")
        rows.append([name, *cells])
    first, *others = results
    base = {(s.score, s.condition): s for s in results[first]}
    for name in others:
        cells = []
        for score in results[name]:
            reference = base[score.score, score.condition]
            low, high = difference_interval(score, reference)
            cells.append(f"{score.accuracy - reference.accuracy:+.1f} [{low:+.1f}, {high:+.1f}]")
        rows.append([f"{name} - {first}", *cells])
    return rows


def as_json(results: Results) -> str:
    """Accuracies, intervals, accuracies by layer, and errors of each utterance."""

    def record(score: ProbeScore) -> dict[str, Any]:
        return {
            "score": score.score,
            "condition": score.condition,
            "accuracy": score.accuracy,
            "interval": accuracy_interval(score),
            "layers": score.layers,
            "utterances": {
                name: [int(errors), int(count)]
                for name, errors, count in zip(score.names, score.errors, score.counts, strict=True)
            },
        }

    return json.dumps({name: [record(s) for s in scores] for name, scores in results.items()})


def draw_layers(results: Results) -> bytes:
    """Accuracy of each layer alone, a panel for each score, as PNG; dotted: all layers together."""
    heads = columns(results)
    across = min(3, len(heads))
    down = -(-len(heads) // across)
    figure = new_figure(3.2 * across + 2.0, 2.7 * down)
    axes = figure.subplots(down, across, squeeze=False).flat
    handles: dict[str, object] = {}
    for axis, head in zip(axes, heads, strict=False):
        for number, (name, scores) in enumerate(results.items()):
            score = next(s for s in scores if (s.score, s.condition) == head)
            style = {
                "color": COLOURS[number % len(COLOURS)],
                "ls": LINES[number // len(COLOURS) % len(LINES)],
            }
            depth = np.linspace(0, 1, len(score.layers))
            (handles[name],) = axis.plot(depth, score.layers, marker="o", ms=3, **style)
            axis.axhline(score.accuracy, color=style["color"], ls=":", lw=1)
        axis.set(title=title(*head), xlabel="layer, first to last", ylabel="accuracy (%)")
        axis.grid(alpha=0.3)
    for axis in list(axes)[len(heads) :]:
        axis.set_visible(False)
    add_legend(figure, handles)
    return png(figure)
