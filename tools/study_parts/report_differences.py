"""Section of the report on differences, and which of their intervals exclude 0."""

from __future__ import annotations

from collections.abc import Iterator

from s3prl_ekd.system.tables import markdown_table

from .cells import METRICS, Metric
from .compare import RowComparison, Study
from .design import NONE, rows
from .intervals import LEVEL
from .words import condition_heading, format_estimate

CER = next(metric for metric in METRICS if metric.characters)


def differences(study: Study) -> Iterator[str]:
    """Yield Markdown: a table for each condition, then a sentence for each clear difference."""
    for metric in study.metrics:
        if _saturated(study, metric):
            yield (
                f"{metric.title[:-2]}: every student has 98 % errors or more, so this column does "
                "not distinguish them.\n"
            )
    if not study.comparisons:
        return
    yield "## Differences\n"
    yield (
        "In percentage points, paired by seed and utterance. The best single teacher is the one "
        f"whose students have the best mean on clean dev over the seeds{_best(study)}. The "
        "intervals take this choice as given. Part of its lead may be luck of these seeds, which "
        "carries over to the test set: this biases the comparison against the ensembles.\n"
    )
    if CER in study.metrics:
        yield "For ASR the best single teacher is chosen by dev WER, also in the column CER.\n"
    ties = [
        f"{task.upper()} at {size}: the single teachers tie on dev, so none is best."
        for (size, task), name in study.best.items()
        if name is None
    ]
    if ties:
        yield " ".join(ties) + "\n"
    for condition in study.results.conditions:
        comparisons = [c for c in study.comparisons if c.condition == condition]
        yield f"{condition_heading(condition)}:\n"
        yield markdown_table(list(_difference_table(study, comparisons))) + "\n"
    over_seeds = [c for c in study.comparisons if c.estimate.over_seeds]
    count, total = len(over_seeds), len(study.comparisons)
    if count < total:
        yield (
            f"†: one seed only, {total - count} of {total}; these intervals lack the variation "
            "between seeds, so they show no difference and are not counted.\n"
        )
    yield from _clear("Among distilled students", [c for c in over_seeds if not c.is_control])
    yield from _clear("Against no distillation", [c for c in over_seeds if c.is_control])


def _clear(heading: str, comparisons: list[RowComparison]) -> Iterator[str]:
    """Yield the number of intervals that exclude 0, and a sentence for each of them."""
    if not comparisons:
        return
    clear = [c for c in comparisons if c.estimate.excludes_zero]
    yield (
        f"{heading}, {len(clear)} of {len(comparisons)} intervals exclude 0; without any true "
        f"difference, about {(1 - LEVEL) * len(comparisons):.1f} would by chance. They are not "
        "independent and not corrected for multiple comparisons."
        f"{'' if clear else ' So no difference is shown here.'}\n"
    )
    for comparison in clear:
        yield f"- {sentence(comparison)}"
    if clear:
        yield ""


def _best(study: Study) -> str:
    best = [f"{t.upper()} at {size}: {name}" for (size, t), name in study.best.items() if name]
    return f" ({'; '.join(best)})" if best else ""


def _saturated(study: Study, metric: Metric) -> bool:
    values = [
        study.means[row.name, metric.key, condition].value
        for row in rows(study.setting)
        for condition in study.results.conditions
        if (row.name, metric.key, condition) in study.means
    ]
    return bool(values) and not metric.higher and min(values) >= 98


def _difference_table(study: Study, comparisons: list[RowComparison]) -> Iterator[list[str]]:
    yield ["size", "difference", *(metric.title for metric in study.metrics)]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for c in comparisons:
        cells = lines.setdefault((c.size, c.label), {})
        mark = "" if c.estimate.over_seeds else "†"
        cells[c.metric.key] = format_estimate(c.estimate, sign=True) + mark
    for (size, label), cells in lines.items():
        yield [size, label, *(cells.get(metric.key, "–") for metric in study.metrics)]


def sentence(c: RowComparison) -> str:
    """Describe a comparison in a sentence."""
    baseline = f"the best single teacher ({c.baseline})" if c.is_best_single else c.baseline
    baseline = "no distillation" if baseline == NONE else baseline
    low, high = sorted((abs(c.estimate.low), abs(c.estimate.high)))
    condition = condition_heading(c.condition)
    condition = condition[:1].lower() + condition[1:]
    verb = "is better than" if c.improves else "is worse than"
    return (
        f"{c.metric.title[:-2]}, {condition}, size {c.size}: {c.row} {verb} "
        f"{baseline} by {abs(c.estimate.value):.1f} [{low:.1f}, {high:.1f}] points."
    )
