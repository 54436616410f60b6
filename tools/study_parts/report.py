"""The facts of docs/study.md between two marks, docs/study.csv, and the plots beside them.

What stands outside the marks is written by people and kept.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from marked_text import between

from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.pretrain.sweep import markdown_table

from . import plots
from .compare import Study
from .design import PROBES, rows
from .folder import Folder
from .intervals import LEVEL
from .parts import Part
from .report_differences import differences
from .table_csv import as_csv
from .words import shown, title

BEGIN = "<!-- study: begin; written by tools/study.py, edit outside the two marks -->"
END = "<!-- study: end -->"
TITLE = "# One teacher or three: a first look\n"


def write_report(study: Study, folder: Folder, parts: list[Part], docs: Path) -> list[Path]:
    """Write all of it; returns the files.

    Raises:
        SetupError: a file cannot be written, or the marks in study.md are not a pair.
    """
    text, table, pictures = docs / "study.md", docs / "study.csv", plots.plots(study)
    try:
        docs.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            with atomic_file(docs / name) as file:
                picture(file)
        body = "\n".join(sections(study, folder, parts, list(pictures)))
        before = text.read_text(encoding="utf-8") if text.exists() else f"{TITLE}\n{BEGIN}\n{END}\n"
        _put(text, between(before, BEGIN, END, body, text).encode())
        _put(table, as_csv(study).encode())
    except OSError as error:
        raise SetupError(f"{docs} cannot be written to: {error.strerror}") from None
    return [text, table, *(docs / name for name in pictures)]


def _put(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def sections(study: Study, folder: Folder, parts: list[Part], pictures: list[str]) -> Iterator[str]:
    """Markdown, piece by piece."""
    yield from _setting(study)
    for condition in study.found.conditions:
        yield f"## {title(condition)}\n"
        yield markdown_table(list(_table(study, condition))) + "\n"
    if study.means:
        yield (
            f"Mean over the seeds and, in brackets, its {LEVEL:.0%} interval. It covers other test "
            "utterances of the same kind (bootstrap of the utterances, the same draws for all "
            "rows) and other seeds of distillation and downstream training (Student's t, which is "
            "wide with so few of them). It does not cover other training data, other speakers or "
            "noises, other teachers, other learning rates, or longer training. †: fewer seeds than "
            "wanted; of one seed the interval covers the utterances alone. References have the "
            "seeds of their own runs.\n"
        )
    yield from _references(study)
    yield from differences(study)
    for name in pictures:
        yield f"![{plots.ABOUT[name]}]({name})\n"
    yield from _time(folder, parts)


def _setting(study: Study) -> Iterator[str]:
    s, found = study.setting, study.found
    cells = len(list(rows(s))) * len(study.metrics) * 2  # clean and noisy
    yield (
        f"{found.finished} of {found.wanted} downstream models are finished; {study.whole} of "
        f"{cells} cells have all {len(s.seeds)} seeds.\n"
    )
    yield "## Setting\n"
    layers = ", ".join(map(str, s.layers))
    seeds = ", ".join(map(str, s.seeds))
    yield f"- Teachers: {', '.join(s.teachers)}; targets: outputs of layers {layers} of each."
    yield (
        f"- Students: of each teacher alone, and of all {len(s.teachers)} under average, concat "
        f"and separate heads; {len(s.sizes)} sizes; seeds {seeds}."
    )
    yield (
        "- First weights: random for all."
        if s.init is None
        else f"- First weights: those of {s.init} for all, its first layers and its conv "
        "extractor, which is not trained further."
    )
    yield "- Row none: students with these weights that no one has taught, the control."
    for name, size in s.sizes.items():
        counted = [c.parameters for row, c in found.costs.items() if row.startswith(f"{name}-")]
        about = f", {max(counted):,} parameters" if counted else ""
        yield (
            f"- Size {name}: {size.channels} conv channels, "
            f"{size.layers} transformer layer{'s' if size.layers > 1 else ''} of "
            f"{size.width}{about}."
        )
    heard = s.steps * s.batch * s.seconds / 3600
    yield (
        f"- Each distillation: {s.steps} steps of {s.batch} excerpts of at most {s.seconds:g} s "
        f"(at most {heard:.2f} h heard), learning rate {s.lr:g}, L1 and cosine; the same data, "
        "order and seeds for all."
    )
    for task, steps in s.tasks.items():
        lr = f", learning rate {found.recipes[task][0]:g}" if task in found.recipes else ""
        steps = found.recipes.get(task, (0, steps))[1]
        probe = f" of {PROBES[task]}" if task in PROBES else ""
        yield f"- {task.upper()}: {steps} downstream steps{probe}{lr}."
    if "sid" in s.tasks:
        yield f"- SID is tested on the middle {s.sid_seconds:g} s of each utterance."
    if "er" in s.tasks:
        folds = "each speaker left out once" if s.all_folds else "the manifest's split"
        yield f"- ER: {folds}."
    if found.alone:
        tasks = ", ".join(task.upper() for task in found.alone)
        yield f"- Features of {tasks}: of each utterance alone (--cache-features)."
    yield ""


def _table(study: Study, condition: str) -> Iterator[list[str]]:
    yield ["size", "learned from", *(metric.title for metric in study.metrics)]
    labels = [(row.name, row.size, row.learned_from) for row in rows(study.setting)]
    labels += [(name, "reference", name) for name in study.found.references]
    for name, size, learned_from in labels:
        cells = []
        for metric in study.metrics:
            estimate = study.means.get((name, metric.key, condition))
            cells.append(shown(estimate) if estimate else "–")
            cell = study.found.cells.get((name, metric.key, condition))
            if cell and size != "reference" and len(cell.seeds) < len(study.setting.seeds):
                cells[-1] += " †"
        yield [size, learned_from, *cells]


def _references(study: Study) -> Iterator[str]:
    if study.found.differing:
        told = [f"{run} ({', '.join(what)})" for run, what in study.found.differing.items()]
        yield f"References not run like the students: {'; '.join(told)}.\n"


def _time(folder: Folder, parts: list[Part]) -> Iterator[str]:
    kinds: dict[str, list] = {}
    for part in parts:
        spent = folder.spent(part.name)
        if spent is not None:
            kinds.setdefault(part.kind, []).append(spent)
    if not kinds:
        return
    yield "## Time\n"
    table = [["part", "finished", "seconds each", "CPU seconds each", "CPU minutes"]]
    for kind, spent in kinds.items():
        cpu = sum(each.cpu for each in spent)
        clock = sum(each.seconds for each in spent)
        count = len(spent)
        cells = (f"{clock / count:.0f}", f"{cpu / count:.0f}", f"{cpu / 60:.1f}")
        table.append([f"{kind} (all students of a seed)" if kind == "evaluate" else kind]
                     + [str(count), *cells])  # fmt: skip
    yield markdown_table(table) + "\n"
    yield f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.\n"
