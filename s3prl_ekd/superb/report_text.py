"""Format a report as Markdown and as tidy CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence

from ..downstream.tasks import TASKS
from ..system.tables import markdown_table
from .report import CLEAN, Difference, Report, condition_title
from .score import LABEL, PUBLISHED, superb_score

MARK = "<!-- written by: s3prl-ekd report -->"  # a file with this mark may be overwritten
_RUNS = (
    "For each upstream and task, the learning rate with the best mean dev metric among those with "
    "all seeds and folds."
)


def as_markdown(report: Report, against: str | None = None, *, published: bool = False) -> str:
    """Format the report as Markdown tables with captions.

    Args:
        against: add the paired differences of all other upstreams to this one.
        published: add published results on SUPERB's public set.
    """
    parts = [MARK, "# Downstream results", _caption(report), markdown_table(_main_table(report))]
    for condition in report.conditions:
        if condition != CLEAN:
            table = markdown_table(_metric_table(report, condition))
            parts += [f"## Under noise: {condition_title(condition)}", table]
    if against is not None and len(report.upstreams) > 1:
        parts += _differences(report, against)
    if published:
        parts += _published()
    parts += ["## Runs", _RUNS, markdown_table(_runs_table(report))]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _caption(report: Report) -> str:
    several = any(m.deviation is not None for m in report.metrics.values())
    seeds = " Means over seeds; sd: standard deviation over seeds." if several else ""
    costs = ""
    if report.costs:
        counts = {(c.utterances, c.profiler) for c in report.costs.values()}
        costs = " GMACs: " + "; ".join(f"sum over {n} utterances, {p}" for n, p in sorted(counts))
        costs += "."
    return (
        "Test set metrics in per cent, with 95 % percentile bootstrap intervals over utterances "
        f"({report.resamples:,} resamples).{seeds} ↓ lower is better, ↑ higher is better. An "
        "interval covers the sampling of test utterances, not the randomness of training."
        f"{costs} The last column is the {LABEL}; recipes used here: "
        + ", ".join(sorted({s.runs[0].recipe for s in report.selections.values()}))
        + ". An upstream without a result on all four tasks has no score."
    )


def _main_table(report: Report) -> list[list[str]]:
    rows = _metric_table(report, CLEAN)
    head, body = rows[0], rows[1:]
    table = [[head[0], "params (M)", "GMACs", *head[1:], "SUPERB score ↑"]]
    for row in body:
        cost, score = report.costs.get(row[0]), report.scores.get(row[0])
        cells = ["–", "–"]
        if cost is not None:
            cells = [f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.2f}"]
        cell = "–" if score is None else with_interval(score.value, *score.interval, digits=1)
        table.append([row[0], *cells, *row[1:], cell])
    return table


def _metric_table(report: Report, condition: str) -> list[list[str]]:
    # The clean table has all four tasks, tested or not, because the score needs all of them.
    tasks = tuple(TASKS) if condition == CLEAN else report.tested(condition)
    head, body = ["upstream"], [[name] for name in report.upstreams]
    for task in tasks:
        column = [report.metrics.get((name, task, condition)) for name in report.upstreams]
        head.append(TASKS[task].title)
        deviations = [m.deviation if m else None for m in column]
        several = any(d is not None for d in deviations)
        if several:
            head.append(f"{task.upper()} sd")
        for row, m, deviation in zip(body, column, deviations, strict=True):
            row.append(with_interval(m.value, *m.interval) if m else "–")
            if several:
                row.append("–" if deviation is None else f"{deviation:.2f}")
    return [head, *body]


def with_interval(
    value: float, low: float, high: float, digits: int = 2, *, signed: bool = False
) -> str:
    """Format ``45.12 [43.00, 47.21]``; if ``signed``, with a + before non-negative numbers."""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _differences(report: Report, against: str) -> list[str]:
    parts = [
        f"## Differences to {against}",
        f"Each upstream minus {against} on the same resampled utterances, with the 95 % interval, "
        f"and the percentage of resamples in which it is better than {against} (ties count half). "
        "n/a: not tested, or tested on different utterances.",
    ]
    for condition in report.conditions:
        tasks = report.tested(condition)
        head = ["upstream", *(TASKS[task].title for task in tasks)]
        clean = condition == CLEAN
        rows = [[*head, "SUPERB score ↑"] if clean else head]
        for name in report.upstreams:
            if name == against:
                continue
            row = [name]
            for task in tasks:
                row.append(_difference_cell(report.difference(name, against, task, condition)))
            if clean:
                row.append(_difference_cell(report.score_difference(name, against), digits=1))
            rows.append(row)
        parts += [f"### {condition_title(condition)}", markdown_table(rows)]
    return parts


def _difference_cell(difference: Difference | None, digits: int = 2) -> str:
    if difference is None:
        return "n/a"
    d = difference
    return f"{with_interval(d.value, d.low, d.high, digits, signed=True)} {100 * d.better:.1f} %"


def _published() -> list[str]:
    rows = [["model", "params (M)", *(task.title for task in TASKS.values()), "SUPERB score ↑"]]
    rows[0].append("source")
    for row in PUBLISHED:
        parameters = "–" if row.parameters is None else f"{row.parameters:.2f}"
        values = [f"{row.metrics[task]:.2f}" for task in TASKS]
        rows.append([row.name, parameters, *values, f"{superb_score(row.metrics):.1f}", row.source])
    return [
        "## Published, for orientation",
        "SUPERB's public set, its corpora and full recipes, frozen upstream, no language model. "
        "Not comparable with results of other recipes or corpora, least of all of tiny recipes.",
        markdown_table(rows),
    ]


def _runs_table(report: Report) -> list[list[str]]:
    rows = [["upstream", "task", "lr", "dev", "seeds", "folds", "test", "steps", "recipe"]]
    for upstream, task in itertools.product(report.upstreams, report.tasks):
        selection = report.selections.get((upstream, task))
        if selection is None:
            continue
        first = selection.runs[0]
        clean = report.metrics.get((upstream, task, CLEAN))
        rows.append(
            [
                upstream,
                task.upper(),
                f"{selection.lr:g}",
                f"{selection.dev:.2f}",
                " ".join(map(str, selection.seeds)),
                " ".join(fold.removeprefix("fold") for fold in selection.folds if fold) or "–",
                f"{clean.utterances} utterances" if clean else "–",
                str(first.steps),
                first.recipe,
            ]
        )
    return rows


def as_csv(report: Report, against: str | None = None) -> str:
    """Format the report as CSV: a row for each upstream, task and condition, and for each score."""
    head = "upstream task condition metric value low high sd_over_seeds lr seeds folds utterances"
    rows: list[Sequence] = [head.split()]
    if against is not None:
        rows[0] = [*rows[0], "against", "difference", "difference_low", "difference_high", "better"]
    for name in report.upstreams:
        for task in report.tasks:
            for condition in report.conditions:
                m = report.metrics.get((name, task, condition))
                if m is None:
                    continue
                selection = m.selection
                row = [name, task, condition, TASKS[task].metric, *_numbers(m.value, *m.interval)]
                row += ["" if m.deviation is None else _number(m.deviation), f"{selection.lr:g}"]
                row += [" ".join(map(str, selection.seeds))]
                row += [" ".join(filter(None, selection.folds))]
                row.append(str(m.utterances))
                if against is not None:
                    difference = report.difference(name, against, task, condition)
                    row += _difference_cells(name, against, difference)
                rows.append(row)
        if name in report.scores:
            score = report.scores[name]
            row = [name, "all", CLEAN, "superb_score", *_numbers(score.value, *score.interval)]
            row += [""] * 5
            if against is not None:
                row += _difference_cells(name, against, report.score_difference(name, against))
            rows.append(row)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _difference_cells(name: str, against: str, difference: Difference | None) -> list[str]:
    if name == against or difference is None:
        return ["" if name == against else against, "", "", "", ""]
    d = difference
    return [against, *_numbers(d.value, d.low, d.high, d.better)]


def _numbers(*values: float) -> list[str]:
    return [_number(value) for value in values]


def _number(value: float) -> str:
    return f"{value:.6g}"
