"""Run several experiments over several seeds, and put what came out in one table."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..checkpoints import newest, read_run
from ..errors import SetupError
from .curves import teacher_curves
from .scalars import read_scalars

RECORD = "matrix.json"  # in a run's folder, once it is finished: the seconds it took


@dataclass(frozen=True)
class Run:
    """One experiment with one seed, in its folder below the working folder."""

    config: Path  # the model config
    runner: Path  # the runner config
    seed: int
    overrides: str

    @property
    def name(self) -> str:
        return f"{self.config.stem}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return Path("result/matrix") / self.name

    @property
    def words(self) -> list[str]:
        """The command, as typed."""
        words = ["run_pretrain.py", "-u", "ekd", "-p", str(self.folder), "-a"]
        words += ["-c", str(self.runner), "-g", str(self.config), "--seed", str(self.seed)]
        return [*words, "-o", self.overrides] if self.overrides else words


@dataclass(frozen=True)
class Outcome:
    """What a finished run has logged last, and the seconds from its start to its end.

    ``distances``: the reconstruction error to each teacher, averaged over its layers. Other than
    the loss, whose targets differ, these compare between experiments of the same teachers.
    """

    loss: float
    distances: Mapping[str, float]
    seconds: float


def run_all(runs: Sequence[Run], jobs: int = 1) -> Iterator[tuple[Run, Outcome]]:
    """Run what is not finished, ``jobs`` at a time, and yield each run's outcome as it ends.

    Raises:
        SetupError: a run failed; its log is named.
    """
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit=" runs") as bar:
        waiting = {pool.submit(_run, run, jobs): run for run in runs}
        try:
            for done in as_completed(waiting):
                bar.update()
                yield waiting[done], done.result()
        except BaseException:
            for other in waiting:
                other.cancel()
            raise


def _run(run: Run, jobs: int) -> Outcome:
    record = run.folder / RECORD
    if not record.is_file():
        run.folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            done = subprocess.run(
                [sys.executable, "-m", "s3prl_ekd", *run.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": threads, **os.environ},
            )
        if done.returncode:
            raise SetupError(f"{run.name} failed; see {run.folder / 'log.txt'}")
        step = read_run(newest(run.folder))["Step"]
        facts = {"seconds": time.monotonic() - start, "step": step}
        record.write_text(json.dumps(facts), encoding="utf-8")
    return outcome(run.folder)


def outcome(folder: Path) -> Outcome:
    """Read the last scalars of a finished run."""
    scalars = read_scalars(folder)
    distances = {
        teacher: statistics.fmean(_last(points) for points in layers.values())
        for teacher, layers in teacher_curves(scalars).items()
    }
    seconds = json.loads((folder / RECORD).read_text(encoding="utf-8"))["seconds"]
    return Outcome(_last(scalars["ekd/train-loss_mean"]), distances, seconds)


def _last(points: Mapping[int, float]) -> float:
    return points[max(points)]


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """Rows of text, a header first: mean and standard deviation over the seeds.

    Args:
        outcomes: experiment -> one outcome a seed.
    """
    teachers = list(
        dict.fromkeys(name for group in outcomes.values() for o in group for name in o.distances)
    )
    rows = [["experiment", "seeds", "loss", *(f"L1 to {name}" for name in teachers), "seconds"]]
    for name, group in outcomes.items():
        cells = [name, str(len(group)), _spread([o.loss for o in group])]
        for teacher in teachers:
            values = [o.distances[teacher] for o in group if teacher in o.distances]
            cells.append(_spread(values) if values else "")
        rows.append([*cells, f"{statistics.fmean(o.seconds for o in group):.0f}"])
    return rows


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of rows, the first of which is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write_csv(rows: Sequence[Sequence[str]], path: Path) -> None:
    """Write the rows as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
