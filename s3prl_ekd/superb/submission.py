"""Write the archive for SUPERB's public leaderboard, with the layout of s3prl's submit.py."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..downstream.tasks import TASKS
from ..errors import DataError
from ..files.text import check_inside, check_regular
from .results import CLEAN, FinishedRun, SelectedRuns

# (task, fold) -> file or folder of the predictions -> its place in the archive, below predict/
MEMBERS: dict[tuple[str, str | None], dict[str, str]] = {
    (task.name, fold): {a.format(fold=fold): b.format(fold=fold) for a, b in task.archive.items()}
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
        sign = -1 if TASKS[task].dev.higher_is_better else 1
        sums = dict.fromkeys(selection.seeds, 0.0)  # sorted
        for run in selection.runs:
            sums[run.seed] += sign * run.dev.value
        best = min(sums, key=sums.__getitem__)
        runs |= {(task, run.fold): run for run in selection.runs if run.seed == best}
    return {key: runs[key] for key in MEMBERS if key in runs}


def write_archive(runs: Mapping[tuple[str, str | None], FinishedRun], file: BinaryIO) -> None:
    """Write the archive. The same predictions give the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        written: set[str] = set()
        for key, run in runs.items():
            for path, place in _files(run, MEMBERS[key]):
                for folder in reversed(PurePosixPath("predict", place).parents[:-1]):
                    if f"{folder}/" not in written:
                        archive.writestr(_info(f"{folder}/"), b"")
                        written.add(f"{folder}/")
                archive.writestr(_info(f"predict/{place}"), _read(path))


def _files(run: FinishedRun, members: Mapping[str, str]) -> list[tuple[Path, str]]:
    """The prediction files of a run, and their places in the archive; sorted within a folder.

    Raises:
        DataError: they are missing, damaged or outside of the run's folder, or have other
            utterances than the references.
    """
    if CLEAN not in run.tested:
        raise DataError(f"{run.folder}: not tested on clean speech; evaluate the run again")
    folder = run.folder / run.tested[CLEAN]
    files: list[tuple[Path, str]] = []
    for name, place in members.items():
        if "*" in name:
            files += [(path, f"{place}/{path.name}") for path in sorted(folder.glob(name))]
        else:
            files.append((folder / name, place))
    for path, _ in files:
        check_regular(path, "predictions", DataError)
        check_inside(path, run.folder, "predictions", DataError)
    run.measure(CLEAN)
    return files


def _read(path: Path) -> bytes:
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
