"""What the demo's scores say, computed from them: a table, and what can be told apart in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..downstream.tasks import TASKS
from ..superb.report import CLEAN, Difference, Report
from ..superb.report_text import with_interval


def score_table(report: Report, order: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of text with a head: each upstream's metric on each task with its 95 % interval.

    Args:
        report: of the demo's runs.
        order: the upstreams, first row first; those that were not tested are left out.
    """
    rows = [("", *(TASKS[task].title for task in report.tasks))]
    for name in order:
        if name not in report.upstreams:
            continue
        cells = []
        for task in report.tasks:
            found = report.measures.get((name, task, CLEAN))
            cells.append(with_interval(found.value, *found.interval, digits=1) if found else "")
        rows.append((name, *cells))
    return rows


def findings(report: Report, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each pair of upstreams that were both tested: on which tasks the first is better.

    ``tiny_hubert against fbank: better on PR (-12.3), not told apart on ASR (+0.1)``

    Args:
        report: of the demo's runs.
        pairs: (one, other).
    """
    lines = []
    for one, other in pairs:
        said: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
        for task in report.tasks:
            difference = report.difference(one, other, task, CLEAN)
            if difference is not None:
                word = verdict(difference, higher=TASKS[task].higher_is_better)
                said[word].append(f"{task.upper()} ({difference.value:+.1f})")
        parts = [f"{word} on {', '.join(tasks)}" for word, tasks in said.items() if tasks]
        if parts:
            lines.append(f"{one} against {other}: {'; '.join(parts)}")
    return lines


def verdict(difference: Difference, *, higher: bool) -> str:
    """``better``, ``worse``, or ``not told apart`` where the 95 % interval has 0 in it.

    Args:
        difference: one less another.
        higher: whether more is better.
    """
    if difference.low <= 0 <= difference.high:
        return "not told apart"
    return "better" if (difference.value > 0) == higher else "worse"
