"""Write the archive for SUPERB's public leaderboard, with the layout of s3prl's submit.py."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import BinaryIO

from ..downstream.tasks import TASKS
from ..errors import DataError
from ..files.text import check_inside, check_regular
from .results import FinishedRun, SelectedRuns

# (task, fold) -> path in the archive, below predict/
MEMBERS: dict[tuple[str, str | None], str] = {
    (task.name, fold): task.archive.format(fold=fold)
    for task in TASKS.values()
    for fold in task.board_folds or (None,)
}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # ZIP's earliest date: equal contents give equal archives


def choose_runs(
    selections: Mapping[str, SelectedRuns],
) -> dict[tuple[str, str | None], FinishedRun]:
    """Choose one seed for each task: the one with the best dev metric.

    All folds of ER come from one seed, the one with the best mean over folds. Ties go to the
    smallest seed.

    Args:
        selections: task -> runs of one upstream.

    Returns:
        (task, fold) -> run, in the order of the archive.
    """
    runs: dict[tuple[str, str | None], FinishedRun] = {}
    for task, selection in selections.items():
        sign = -1 if TASKS[task].higher_is_better else 1
        sums = dict.fromkeys(selection.seeds, 0.0)  # sorted
        for run in selection.runs:
            sums[run.seed] += sign * run.dev.value
        best = min(sums, key=sums.__getitem__)
        runs |= {(task, run.fold): run for run in selection.runs if run.seed == best}
    return {key: runs[key] for key in MEMBERS if key in runs}


def write_archive(runs: Mapping[tuple[str, str | None], FinishedRun], file: BinaryIO) -> None:
    """Write the archive. The same predictions give the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_info("predict/"), b"")
        for key, run in runs.items():
            folder, _ = MEMBERS[key].split("/")
            archive.writestr(_info(f"predict/{folder}/"), b"")
            archive.writestr(_info(f"predict/{MEMBERS[key]}"), _predictions(run))


def _predictions(run: FinishedRun) -> bytes:
    if "clean" not in run.tested:
        raise DataError(f"{run.folder}: not tested on clean speech; evaluate the run again")
    path, _ = run.files("clean")
    check_regular(path, "predictions", DataError)
    check_inside(path, run.folder, "predictions", DataError)
    data = path.read_bytes()
    if not data:
        raise DataError(f"{path} is empty; evaluate the run again")
    return data


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # Unix, on every platform: equal archives
    if name.endswith("/"):
        info.external_attr = (0o40755 << 16) | 0x10
    else:
        info.external_attr = 0o100644 << 16
        info.compress_type = zipfile.ZIP_DEFLATED
    return info
