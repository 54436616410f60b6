"""The report's part that answers the question: differences, and which of them are clear."""

from __future__ import annotations

from collections.abc import Iterator

from s3prl_ekd.pretrain.sweep import markdown_table

from .cells import METRICS, Metric
from .compare import Comparison, Study
from .design import NONE, rows
from .intervals import LEVEL
from .words import shown, title

CER = next(metric for metric in METRICS if metric.characters)


def differences(study: Study) -> Iterator[str]:
    """Markdown, piece by piece: tables by condition, then a sentence for what is told apart."""
    for metric in study.metrics:
        if _saturated(study, metric):
            yield (
                f"{metric.title[:-2]}: every student has 98 % errors or more, so this column tells "
                "nothing about them.\n"
            )
    if not study.comparisons:
        return
    yield "## Differences\n"
    yield (
        "In points of the metric, paired by seed and utterance. The best single teacher is the one "
        f"whose students are best on dev, clean, over the seeds{_best(study)}. The intervals take "
        "this choice as given, and part of its lead may be luck of these seeds, which it brings "
        "to the test set, too: that speaks against the ensembles.\n"
    )
    if CER in study.metrics:
        yield "ASR is chosen by dev WER, so its CER takes the same choice.\n"
    ties = [
        f"{task.upper()} at {size}: single teachers tie on dev, none is best."
        for (size, task), name in study.best.items()
        if name is None
    ]
    if ties:
        yield " ".join(ties) + "\n"
    for condition in study.found.conditions:
        chosen = [c for c in study.comparisons if c.condition == condition]
        yield f"{title(condition)}:\n"
        yield markdown_table(list(_difference_table(study, chosen))) + "\n"
    over_seeds = [c for c in study.comparisons if c.estimate.over_seeds]
    count, total = len(over_seeds), len(study.comparisons)
    if count < total:
        yield (
            f"†: of one seed alone, {total - count} of {total}; what a seed does is not in these "
            "intervals, so they tell nothing apart and are not counted.\n"
        )
    yield from _clear("Among those who learned", [c for c in over_seeds if not c.control])
    yield from _clear("Against no teacher", [c for c in over_seeds if c.control])


def _clear(what: str, asked: list[Comparison]) -> Iterator[str]:
    """How many of the intervals that ask one question leave 0 out, and which."""
    if not asked:
        return
    clear = [c for c in asked if c.estimate.clear]
    yield (
        f"{what}, {len(clear)} of {len(asked)} intervals leave 0 out; if nothing differed, about "
        f"{(1 - LEVEL) * len(asked):.1f} would by chance. They are not independent and not "
        f"corrected for their number.{'' if clear else ' So nothing here is told apart.'}\n"
    )
    for comparison in clear:
        yield f"- {sentence(comparison)}"
    if clear:
        yield ""


def _best(study: Study) -> str:
    named = [f"{t.upper()} at {size}: {name}" for (size, t), name in study.best.items() if name]
    return f" ({'; '.join(named)})" if named else ""


def _saturated(study: Study, metric: Metric) -> bool:
    values = [
        study.means[row.name, metric.key, condition].value
        for row in rows(study.setting)
        for condition in study.found.conditions
        if (row.name, metric.key, condition) in study.means
    ]
    return bool(values) and not metric.higher and min(values) >= 98


def _difference_table(study: Study, chosen: list[Comparison]) -> Iterator[list[str]]:
    yield ["size", "difference", *(metric.title for metric in study.metrics)]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for c in chosen:
        cells = lines.setdefault((c.size, c.difference), {})
        cells[c.metric.key] = shown(c.estimate, sign=True) + "†" * (not c.estimate.over_seeds)
    for (size, what), cells in lines.items():
        yield [size, what, *(cells.get(metric.key, "–") for metric in study.metrics)]


def sentence(c: Comparison) -> str:
    """One comparison in words."""
    other = f"the best single teacher ({c.other})" if c.best_single else c.other
    other = "no teacher" if other == NONE else other
    low, high = sorted((abs(c.estimate.low), abs(c.estimate.high)))
    condition = title(c.condition)
    condition = condition[:1].lower() + condition[1:]
    verb = "beats" if c.better else "is behind"
    return (
        f"{c.metric.title[:-2]}, {condition}, size {c.size}: {c.one} {verb} "
        f"{other} by {abs(c.estimate.value):.1f} [{low:.1f}, {high:.1f}] points."
    )
