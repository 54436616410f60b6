"""The report: a table and two pictures in docs/study.md, more tables in docs/study_details.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.files.text import read_text
from s3prl_ekd.probe.measure import CLEAN
from s3prl_ekd.superb.report_plots import COLOURS
from s3prl_ekd.system.figures import new_figure, png
from s3prl_ekd.system.tables import markdown_table

from .analysis import (
    CORRECTED,
    EQUIVALENCE,
    LEAST_SEEDS,
    PRIMARY,
    ContrastEstimate,
    Hypothesis,
    Scores,
    estimate,
    estimate_hypotheses,
    holm,
)
from .results import NOISY, StudyResult
from .rows import LABELLED, PROBED_SETS, PROBED_TEACHERS, SETS, Row, rows, set_name

COLUMNS = (
    ("phone frames", CLEAN),
    ("phone frames", NOISY),
    ("speaker", CLEAN),
    ("speaker", NOISY),
    ("emotion", CLEAN),
)
Tested = dict[str, tuple[Hypothesis, ContrastEstimate]]


def report(results: Sequence[StudyResult]) -> tuple[dict[str, str], dict[str, bytes]]:
    """The Markdown between the marks of each page, and the pictures, both by file name."""
    scores = Scores(results)
    tested = estimate_hypotheses(scores)
    contrasts, tables, pictures = [_facts(results)], [], {}
    if tested:
        pictures["study.headroom.png"] = _draw_headroom(scores)
        pictures["study.png"] = _draw_rows(scores)
        contrasts += [
            _hypothesis_table(tested),
            "![gain over the best single teacher against headroom](study.headroom.png)",
            "![accuracy by row, with 95 % intervals of the difference to none](study.png)",
        ]
    if scores.students:
        tables += ["## Students", _student_table(scores)]
    tables += ["## Teachers", _teacher_table(scores)]
    if tested:
        tables += ["## Power", _power(tested)]
    pages = {"study.md": contrasts, "study_details.md": tables}
    return {name: "\n\n".join(parts) for name, parts in pages.items()}, pictures


def _facts(results: Sequence[StudyResult]) -> str:
    students = [r for r in results if r.seed]
    trained = [r for r in students if r.steps]
    machines = ", ".join(sorted({r.machine for r in results}))
    steps = ", ".join(map(str, sorted({r.steps for r in trained})))
    hours = sum(r.seconds for r in results) / 3600
    seeds = len({r.seed for r in students})
    return (
        f"{len(trained)} students of {steps} updates and {len(students) - len(trained)} untrained "
        f"ones, {seeds} seeds; {hours:.1f} h on one core each ({machines})."
    )


def _head(score: str, condition: str) -> str:
    return score if condition == CLEAN else f"{score}, noisy"


def _teacher_table(scores: Scores) -> str:
    table = [["teachers", *(_head(*c) for c in COLUMNS), "headroom"]]
    names = [(name,) for name in PROBED_TEACHERS]
    for teachers in [*names, *PROBED_SETS]:
        result = scores.teachers.get(set_name(teachers))
        if result is None:
            continue
        cells = [f"{scores.accuracy(result, column)[0]:.1f}" for column in COLUMNS]
        room = scores.headroom(teachers) if len(teachers) > 1 else None
        head = "" if room is None else f"{room[0]:+.2f}"
        marked = " (labels)" if set(teachers) & set(LABELLED) else ""
        table.append([set_name(teachers) + marked, *cells, head])
    return (
        "Accuracy of the probes on the teachers' target layers, per cent; those of sets reduced to "
        "as many dimensions as one teacher has. Headroom: by how much the score of a set, on "
        "phone frames and speaker, both clean, exceeds that of its best member.\n\n"
        + markdown_table(table)
    )


def _student_table(scores: Scores) -> str:
    table = [["learned from", "n", *(_head(*c) for c in COLUMNS), "score", "worst"]]
    for row in rows():
        seeds = scores.seeds([row.name])
        if not seeds:
            continue
        cells = []
        for column in COLUMNS:
            values = [scores.accuracy(scores.students[row.name, s], column)[0] for s in seeds]
            cells.append(_mean_and_deviation(values, 1))
        values = [scores.normalised(row.name, seed)[0] for seed in seeds]
        cells.append(_mean_and_deviation(values, 2))
        worst = [scores.worst(row.name, seed)[0] for seed in seeds]
        table.append([row.name, str(len(seeds)), *cells, _mean_and_deviation(worst, 2)])
    ends = "; ".join("{}: {:.1f} to {:.1f}".format(_head(*s), *scores.span(s)) for s in PRIMARY)
    return (
        "Accuracy in per cent, mean ± standard deviation over seeds. Score: share of the way from "
        "the untrained student to the best probe of a teacher without labels, mean of two "
        f"({ends}); worst: the smaller of the two.\n\n" + markdown_table(table)
    )


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _hypothesis_table(tested: Tested) -> str:
    # hypotheses without results yet count as 1, so that all are corrected for
    missing = dict.fromkeys((key for key in CORRECTED if key not in tested), 1.0)
    corrected = holm({key: e.p for key, (_, e) in tested.items() if key in CORRECTED} | missing)
    small = holm(
        {key: e.p_equivalent for key, (_, e) in tested.items() if key in CORRECTED} | missing
    )
    table = [["", "contrast of scores", "n", "estimate", "p", "p, Holm", "shown"]]
    for key, (hypothesis, e) in tested.items():
        p, verdict = corrected.get(key), []
        if len(e.by_seed) < LEAST_SEEDS:
            verdict = [f"(fewer than {LEAST_SEEDS} seeds)"]
        else:
            if (e.p if p is None else p) < 0.05:
                verdict.append("> 0" if e.value > 0 else "< 0")
            if small.get(key, e.p_equivalent) < 0.05 and not key.startswith("H1b"):
                verdict.append(f"within ±{EQUIVALENCE:g}")
        table.append(
            [
                key,
                hypothesis.question,
                str(len(e.by_seed)),
                f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]",
                _probability(e.p),
                "" if p is None else _probability(p),
                ", ".join(verdict) or "–",
            ]
        )
    return (
        f"Mean over seeds with its 95 % interval. The p-values of {', '.join(CORRECTED)} are "
        "corrected for their number (Holm), in both tests; H1b is per unit of headroom.\n\n"
        + markdown_table(table)
    )


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


def _power(tested: Tested) -> str:
    table = [["", "deviation over seeds", "found at 5 %", "found after correction"]]
    for key, (_, e) in tested.items():
        once, corrected = (f"{value:.2f}" for value in e.detectable)
        table.append([key, f"{e.deviation:.3f}", once, corrected if key in CORRECTED else ""])
    return (
        "Standard deviation of a contrast over seeds, and its smallest true value that is found "
        "with 80 % power, at 5 % and at the first step of Holm's correction.\n\n"
        + markdown_table(table)
    )


def _draw_headroom(scores: Scores) -> bytes:
    """Gain of heads over the best single teacher against headroom, a point for each set."""
    figure = new_figure(6.0, 4.0)
    axis = figure.subplots()
    for number, teachers in enumerate(SETS):
        together, best = Row(teachers).name, scores.best_single(teachers)
        seeds = scores.seeds([together, best])
        if len(seeds) < 2 or scores.headroom(teachers) is None:
            continue
        gains = np.stack(
            [scores.normalised(together, s) - scores.normalised(best, s) for s in seeds]
        )
        e, x = estimate(gains), float(scores.headroom(teachers)[0])
        axis.errorbar(
            [x], [e.value], yerr=[[e.value - e.low], [e.high - e.value]], fmt="o", capsize=3,
            color=COLOURS[number], label=set_name(teachers),
        )  # fmt: skip
    axis.axhline(0, color="grey", lw=0.8)
    axis.axhspan(-EQUIVALENCE, EQUIVALENCE, color="grey", alpha=0.15)
    axis.set(
        xlabel="headroom: score of all teachers' probe - best one's",
        ylabel="score of heads - best single teacher's student",
    )
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    return png(figure)


def _draw_rows(scores: Scores) -> bytes:
    """Accuracies of all rows with 95 % intervals of the difference to ``none``."""
    names = [row.name for row in rows() if len(scores.seeds([row.name, "none"])) >= 2]
    figure = new_figure(3.4 * len(COLUMNS[:4]) + 2.5, 1.2 + 0.28 * len(names))
    axes = figure.subplots(1, 4, sharey=True)
    for axis, column in zip(axes, COLUMNS, strict=False):
        for place, name in enumerate(names):
            seeds = scores.seeds([name, "none"])
            values = [scores.accuracy(scores.students[name, s], column) for s in seeds]
            base = [scores.accuracy(scores.students["none", s], column) for s in seeds]
            middle = float(np.mean([v[0] for v in values]))
            colour = COLOURS[0] if "+" in name else COLOURS[1] if name != "none" else "grey"
            if name == "none":
                axis.axvline(middle, color="grey", lw=0.8, ls=":")
                axis.plot([middle], [place], "o", color=colour, ms=4)
                continue
            e = estimate(np.stack(values) - np.stack(base))
            margins = [[e.value - e.low], [e.high - e.value]]
            axis.errorbar([middle], [place], xerr=margins, fmt="o", ms=4, color=colour, capsize=2)
        axis.set(title=_head(*column), xlabel="accuracy (%)")
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    return png(figure)


def write_report(results: Sequence[StudyResult], docs: Path) -> list[Path]:
    """Write the text between the marks of the pages in ``docs``, and the pictures.

    Raises:
        SetupError: a page is missing or has no marks.
    """
    from marked_text import between

    texts, pictures = report(results)
    files = dict(pictures)
    for name, text in texts.items():
        page = docs / name
        whole = between(read_text(page, "page", SetupError), BEGIN, END, text, page)
        files[name] = whole.encode()
    for name, contents in files.items():
        with atomic_file(docs / name) as file:
            file.write(contents)
    return [docs / name for name in files]


BEGIN = "<!-- study: begin; written by tools/study.py, edit outside the two marks -->"
END = "<!-- study: end -->"
