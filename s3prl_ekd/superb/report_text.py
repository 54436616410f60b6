"""Format a report as Markdown and as tidy CSV."""

from __future__ import annotations

import csv
import io
import itertools

from ..downstream.tasks import COLUMNS, DEFAULT_TASKS, TASKS
from ..system.tables import markdown_table
from .bootstrap import Estimate
from .report import Difference, Report, condition_title
from .results import CLEAN
from .score import LABEL, PUBLISHED, superb_score

MARK = "<!-- written by: s3prl-ekd report -->"  # a file with this mark may be overwritten
UTTERANCES = "utterances"
_COLUMNS = (
    "upstream task condition metric value low high sd_over_seeds lr seeds folds units"
).split()
_DIFFERENCE_COLUMNS = "against difference difference_low difference_high better".split()
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
    counts = sorted({(c.utterances, c.profiler) for c in report.costs.values()})
    sums = "; ".join(f"sum over {n} utterances, {profiler}" for n, profiler in counts)
    costs = f" GMACs: {sums}." if counts else ""
    others = [f"{TASKS[t].unit} ({t.upper()})" for t in report.tasks if TASKS[t].unit != UTTERANCES]
    units = ", ".join([UTTERANCES, *others])
    of_all = f" A second score is over all {len(TASKS)} tasks." if report.scores_of_all else ""
    recipes = ", ".join(sorted({s.runs[0].recipe for s in report.selections.values()}))
    return (
        f"Test set metrics in per cent, with 95 % percentile bootstrap intervals over {units} "
        f"({report.resamples:,} resamples).{seeds} ↓ lower is better, ↑ higher is better. An "
        "interval covers the sampling of the test set, not the randomness of training."
        f"{costs} The score is the {LABEL}; recipes used here: {recipes}. It is the mean over PR, "
        "SID, ER and ASR; an upstream without a result on all of them has none."
        f"{of_all}"
    )


def _main_table(report: Report) -> list[list[str]]:
    head, *body = _metric_table(report, CLEAN)
    scores = [("SUPERB score ↑", report.scores)]
    if report.scores_of_all:
        scores.append((f"score of {len(TASKS)} tasks ↑", report.scores_of_all))
    table = [[head[0], "params (M)", "GMACs", *head[1:], *(title for title, _ in scores)]]
    for name, *metrics in body:
        cost = report.costs.get(name)
        sizes = (f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.2f}") if cost else ("–", "–")
        cells = [_score_cell(by_upstream.get(name)) for _, by_upstream in scores]
        table.append([name, *sizes, *metrics, *cells])
    return table


def _score_cell(score: Estimate | None) -> str:
    return "–" if score is None else with_interval(score.value, *score.interval, digits=1)


def _metric_table(report: Report, condition: str) -> list[list[str]]:
    columns = report.tested(condition)
    if condition == CLEAN:  # with the tasks of the score, tested or not
        columns = tuple(name for name in COLUMNS if name in {*columns, *DEFAULT_TASKS})
    head, body = ["upstream"], [[name] for name in report.upstreams]
    for column in columns:
        metrics = [report.metrics.get((name, column, condition)) for name in report.upstreams]
        title = COLUMNS[column].title
        head.append(title)
        for row, m in zip(body, metrics, strict=True):
            row.append(with_interval(m.value, *m.interval) if m else "–")
        deviations = [m.deviation if m else None for m in metrics]
        if any(d is not None for d in deviations):
            head.append(f"{title.split()[0] if column in TASKS else title[:-2]} sd")
            for row, deviation in zip(body, deviations, strict=True):
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
        f"Each upstream minus {against} on the same resamples, with the 95 % interval, "
        f"and the percentage of resamples in which it is better than {against} (ties count half). "
        "n/a: not tested, or not with the same recipe, corpus, test set and noises.",
    ]
    for condition in report.conditions:
        columns = report.tested(condition)
        head = ["upstream", *(COLUMNS[column].title for column in columns)]
        clean = condition == CLEAN
        rows = [[*head, "SUPERB score ↑"] if clean else head]
        for name in report.upstreams:
            if name == against:
                continue
            differences = [report.difference(name, against, c, condition) for c in columns]
            rows.append([name, *map(_difference_cell, differences)])
            if clean:
                score = report.score_difference(name, against)
                rows[-1].append(_difference_cell(score, digits=1))
        parts += [f"### {condition_title(condition)}", markdown_table(rows)]
    return parts


def _difference_cell(d: Difference | None, digits: int = 2) -> str:
    if d is None:
        return "n/a"
    return f"{with_interval(d.value, d.low, d.high, digits, signed=True)} {100 * d.better:.1f} %"


def _published() -> list[str]:
    titles = [COLUMNS[name].title for name in DEFAULT_TASKS]
    rows = [["model", "params (M)", *titles, "SUPERB score ↑", "source"]]
    for row in PUBLISHED:
        parameters = "–" if row.parameters is None else f"{row.parameters:.2f}"
        values = [f"{row.metrics[task]:.2f}" for task in DEFAULT_TASKS]
        rows.append([row.name, parameters, *values, f"{superb_score(row.metrics):.1f}", row.source])
    return [
        "## Published, for orientation",
        "SUPERB's public set, its corpora and full recipes, frozen upstream, no language model. "
        "Not comparable with results of other recipes or corpora, least of all of tiny recipes.",
        markdown_table(rows),
    ]


def _runs_table(report: Report) -> list[list[str]]:
    rows = ["upstream task lr dev chosen seeds folds test steps recipe".split()]
    for upstream, task in itertools.product(report.upstreams, report.tasks):
        selection = report.selections.get((upstream, task))
        if selection is None:
            continue
        clean = report.metrics.get((upstream, task, CLEAN))
        row = [upstream, task.upper(), _rate(selection.lr, "–"), f"{selection.dev:.2f}"]
        row.append(", ".join(dict.fromkeys(run.dev.chosen for run in selection.runs)))
        row.append(" ".join(map(str, selection.seeds)))
        row.append(" ".join(f.removeprefix("fold") for f in selection.folds if f) or "–")
        row.append(f"{clean.units} {TASKS[task].unit}" if clean else "–")
        rows.append([*row, str(selection.runs[0].steps), selection.runs[0].recipe])
    return rows


def _rate(lr: float | None, untrained: str = "") -> str:
    return untrained if lr is None else f"{lr:g}"


def as_csv(report: Report, against: str | None = None) -> str:
    """Format the report as CSV: a row for each upstream, task and condition, and for each score."""
    rows: list[dict[str, str]] = []
    for name in report.upstreams:
        for column, condition in itertools.product(report.columns, report.conditions):
            m = report.metrics.get((name, column, condition))
            if m is None:
                continue
            row = {"upstream": name, "task": m.selection.task, "condition": condition}
            row |= {"metric": COLUMNS[column].metric.name, **_csv_estimate(m)}
            row |= {} if m.deviation is None else {"sd_over_seeds": f"{m.deviation:.6g}"}
            row |= {"lr": _rate(m.selection.lr), "seeds": " ".join(map(str, m.selection.seeds))}
            row |= {"folds": " ".join(filter(None, m.selection.folds))}
            row |= {"units": str(m.units)}
            if against not in (None, name):
                row |= _csv_difference(against, report.difference(name, against, column, condition))
            rows.append(row)
        if name in report.scores:
            row = {"upstream": name, "task": "all", "condition": CLEAN, "metric": "superb_score"}
            row |= _csv_estimate(report.scores[name])
            if against not in (None, name):
                row |= _csv_difference(against, report.score_difference(name, against))
            rows.append(row)
        if name in report.scores_of_all:
            row = {"upstream": name, "task": "all", "condition": CLEAN}
            row |= {"metric": f"superb_score_of_{len(TASKS)}"}
            rows.append(row | _csv_estimate(report.scores_of_all[name]))
    text = io.StringIO()
    columns = _COLUMNS if against is None else _COLUMNS + _DIFFERENCE_COLUMNS
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_estimate(estimate: Estimate) -> dict[str, str]:
    low, high = estimate.interval
    values = {"value": estimate.value, "low": low, "high": high}
    return {column: f"{value:.6g}" for column, value in values.items()}


def _csv_difference(against: str, d: Difference | None) -> dict[str, str]:
    values = () if d is None else (d.value, d.low, d.high, d.better)
    return dict(zip(_DIFFERENCE_COLUMNS, [against, *(f"{v:.6g}" for v in values)], strict=False))
