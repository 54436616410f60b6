"""Write docs/study.md (between two marks), docs/study.csv and the plots.

The text outside the marks is written by hand and is kept.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from marked_text import between

from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.system.tables import markdown_table

from . import plots
from .compare import Study
from .design import PROBES, rows
from .folder import StudyFolder
from .intervals import LEVEL
from .parts import Job
from .report_differences import differences
from .table_csv import as_csv
from .words import condition_heading, format_estimate

BEGIN = "<!-- study: begin; written by tools/study.py, edit outside the two marks -->"
END = "<!-- study: end -->"
TITLE = "# One teacher or three: a first look\n"


def write_report(study: Study, folder: StudyFolder, jobs: list[Job], docs: Path) -> list[Path]:
    """Write all files of the report and return their paths.

    Raises:
        SetupError: cannot write a file, or the marks in study.md are missing or repeated.
    """
    text, table, pictures = docs / "study.md", docs / "study.csv", plots.plots(study)
    try:
        docs.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            with atomic_file(docs / name) as file:
                picture(file)
        body = "\n".join(sections(study, folder, jobs, list(pictures)))
        old = text.read_text(encoding="utf-8") if text.exists() else f"{TITLE}\n{BEGIN}\n{END}\n"
        _put(text, between(old, BEGIN, END, body, text).encode())
        _put(table, as_csv(study).encode())
    except OSError as error:
        raise SetupError(f"cannot write to {docs}: {error.strerror}") from None
    return [text, table, *(docs / name for name in pictures)]


def _put(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def sections(
    study: Study, folder: StudyFolder, jobs: list[Job], pictures: list[str]
) -> Iterator[str]:
    """Yield the report as pieces of Markdown."""
    yield from _setting(study)
    for condition in study.results.conditions:
        yield f"## {condition_heading(condition)}\n"
        yield markdown_table(list(_table(study, condition))) + "\n"
    if study.means:
        yield (
            f"Mean over the seeds, with its {LEVEL:.0%} interval in brackets. The interval covers "
            "other test utterances of the same kind (bootstrap, with the same resamples for all "
            "rows) and other seeds of distillation and downstream training (Student's t, wide with "
            "so few seeds). It does not cover other training data, speakers, noises, teachers or "
            "learning rates, or longer training. †: fewer seeds than planned; with one seed, the "
            "interval covers the utterances only. References have the seeds of their own runs.\n"
        )
    yield from _references(study)
    yield from differences(study)
    for name in pictures:
        yield f"![{plots.ABOUT[name]}]({name})\n"
    yield from _time(folder, jobs)


def _setting(study: Study) -> Iterator[str]:
    s, results = study.setting, study.results
    cells = len(list(rows(s))) * len(study.metrics) * 2  # clean and noisy
    yield (
        f"{results.finished} of {results.planned} downstream models are finished; "
        f"{study.complete_cells} of {cells} cells have all {len(s.seeds)} seeds.\n"
    )
    yield "## Setting\n"
    layers = ", ".join(map(str, s.layers))
    seeds = ", ".join(map(str, s.seeds))
    yield f"- Teachers: {', '.join(s.teachers)}; targets: outputs of layers {layers} of each."
    yield (
        f"- Students: from each teacher alone, and from all {len(s.teachers)} under average, "
        f"concat and separate heads; {len(s.sizes)} sizes; seeds {seeds}."
    )
    yield (
        "- Initial weights: random for all."
        if s.init is None
        else f"- Initial weights: the first layers and the conv extractor of {s.init} for all; the "
        "extractor is frozen."
    )
    yield "- Row none: the control, students with these initial weights and no distillation."
    for name, size in s.sizes.items():
        parameters = [
            c.parameters for row, c in results.costs.items() if row.startswith(f"{name}-")
        ]
        count = f", {max(parameters):,} parameters" if parameters else ""
        yield (
            f"- Size {name}: {size.channels} conv channels, "
            f"{size.layers} transformer layer{'s' if size.layers > 1 else ''} of "
            f"{size.width}{count}."
        )
    hours = s.steps * s.batch * s.seconds / 3600
    yield (
        f"- Each distillation: {s.steps} steps of {s.batch} excerpts of at most {s.seconds:g} s "
        f"(at most {hours:.2f} h of audio), learning rate {s.lr:g}, L1 and cosine; the same data, "
        "order and seeds for all."
    )
    for task, steps in s.tasks.items():
        lr = f", learning rate {results.recipes[task][0]:g}" if task in results.recipes else ""
        steps = results.recipes.get(task, (0, steps))[1]
        probe = f" with {PROBES[task]}" if task in PROBES else ""
        yield f"- {task.upper()}: {steps} downstream steps{probe}{lr}."
    if "sid" in s.tasks:
        yield f"- SID is tested on the middle {s.sid_seconds:g} s of each utterance."
    if "er" in s.tasks:
        folds = "leave-one-speaker-out cross-validation" if s.all_folds else "the manifest's split"
        yield f"- ER: {folds}."
    if results.features_alone:
        tasks = ", ".join(task.upper() for task in results.features_alone)
        yield f"- Features for {tasks}: computed for each utterance alone (--cache-features)."
    yield ""


def _table(study: Study, condition: str) -> Iterator[list[str]]:
    yield ["size", "learned from", *(metric.title for metric in study.metrics)]
    labels = [(row.name, row.size, row.learned_from) for row in rows(study.setting)]
    labels += [(name, "reference", name) for name in study.results.references]
    for name, size, learned_from in labels:
        cells = []
        for metric in study.metrics:
            estimate = study.means.get((name, metric.key, condition))
            cells.append(format_estimate(estimate) if estimate else "–")
            cell = study.results.cells.get((name, metric.key, condition))
            if cell and size != "reference" and len(cell.seeds) < len(study.setting.seeds):
                cells[-1] += " †"
        yield [size, learned_from, *cells]


def _references(study: Study) -> Iterator[str]:
    if study.results.reference_differences:
        runs = [
            f"{run} ({', '.join(keys)})"
            for run, keys in study.results.reference_differences.items()
        ]
        yield f"References with other settings than the students: {'; '.join(runs)}.\n"


def _time(folder: StudyFolder, jobs: list[Job]) -> Iterator[str]:
    kinds: dict[str, list] = {}
    for job in jobs:
        spent = folder.time_spent(job.name)
        if spent is not None:
            kinds.setdefault(job.kind, []).append(spent)
    if not kinds:
        return
    yield "## Time\n"
    table = [["job", "finished", "seconds each", "CPU seconds each", "CPU minutes"]]
    for kind, spent in kinds.items():
        cpu = sum(time.cpu for time in spent)
        wall = sum(time.seconds for time in spent)
        count = len(spent)
        cells = (f"{wall / count:.0f}", f"{cpu / count:.0f}", f"{cpu / 60:.1f}")
        table.append([f"{kind} (all students of a seed)" if kind == "evaluate" else kind]
                     + [str(count), *cells])  # fmt: skip
    yield markdown_table(table) + "\n"
    yield f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.\n"
