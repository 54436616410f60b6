"""Measure how long a run that failed, or that waits for a batch, takes to end.

Each run is a process of its own, or two of torchrun's. What is measured begins with the error, or
with the signal, and ends when the last process is gone.

example:
  python -m tests.time_to_exit --runs 10
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.workspace import write_workspace

from .conftest import REPO, SIZES, hubert_checkpoint, wavlm_checkpoint, write_configs

LIMIT = 10.0  # seconds
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")


@dataclass(frozen=True)
class Case:
    """``how`` a run is spoiled (see spoiled_run.py), in the process ``rank``; the ``signals`` that
    it gets, each with the seconds to the next one."""

    how: str
    signals: Sequence[tuple[int, float]] = ()
    processes: int = 1
    rank: int = 0


CASES = {
    "an error in a step": Case("error"),
    "SIGTERM while it waits for a batch": Case("stuck", [(signal.SIGTERM, 0)]),
    "SIGINT while it waits for a batch": Case("stuck", [(signal.SIGINT, 0)]),
    "two SIGTERM": Case("endless", [(signal.SIGTERM, 2), (signal.SIGTERM, 0)]),
    "two SIGTERM, in code that is not Python's": Case(
        "foreign", [(signal.SIGTERM, 2), (signal.SIGTERM, 0)]
    ),
    "an error in the second process of two": Case("error", processes=2, rank=1),
    "SIGTERM while the second of two waits": Case("stuck", [(signal.SIGTERM, 0)], 2, 1),
}


@dataclass(frozen=True)
class Ended:
    """How it ended: ``seconds`` since the error or the last signal, ``code``, what it ``said``, the
    ``step`` that is saved, how many processes were ``left``."""

    seconds: float
    code: int
    said: str
    step: int
    left: int


def end_of(folder: Path, case: Case, name: str = "x", limit: float = 60) -> Ended:
    """Start a run in a folder that :func:`write_run` or a test has prepared, and see it end.

    Raises:
        subprocess.TimeoutExpired: it has not ended within ``limit`` seconds; it is killed.
    """
    at, log = folder / f"{name}.at", folder / f"{name}.log"
    module = [*(TORCHRUN if case.processes > 1 else ()), "tests.spoiled_run", "run_pretrain.py"]
    words = ["-u", "ekd", "-n", name, "-c", "runner.yaml", "-g", "model.yaml", "--device", "cpu"]
    data, run = "config.pretrain_expert.datarc", "config.runner"
    words += ["-o", f"{data}.num_workers=2,,{run}.total_steps=1000,,{run}.save_step=900"]
    more = {"SPOILED": case.how, "SPOILED_AT": str(at), "SPOILED_RANK": str(case.rank)}
    paths = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    with open(log, "wb") as file:
        running = subprocess.Popen(
            [sys.executable, "-m", *module, *words],
            cwd=folder,
            stdout=file,
            stderr=file,
            env={**os.environ, **more, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )
    everyone: list[int] = []
    try:
        while not at.exists():
            time.sleep(0.02)
            assert running.poll() is None, log.read_text(errors="replace")[-3000:]
        began = at.stat().st_mtime
        everyone = [running.pid, *_below(running.pid)]
        if case.signals:
            time.sleep(1.5)  # what was read ahead is used up
        for number, pause in case.signals:
            began = time.time()
            running.send_signal(number)
            time.sleep(pause)
        code = running.wait(limit)
        seconds = time.time() - began
        time.sleep(0.2)
        left = [pid for pid in everyone if _alive(pid)]
    finally:
        for pid in everyone:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        running.wait()
    saved = newest(folder / "result/pretrain" / name)
    step = read_run(saved)["Step"] if saved else 0
    return Ended(seconds, code, log.read_text(errors="replace"), step, len(left))


def _below(pid: int) -> list[int]:
    """All processes that come from this one."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, found) for each in (child, *_below(child))]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write_run(folder: Path) -> None:
    """Teachers, a corpus and the configs of a run."""
    from .kill_and_resume import _write_corpus

    teachers = {}
    makers = {"hubert": hubert_checkpoint, "robust": hubert_checkpoint, "wavlm": wavlm_checkpoint}
    for i, (name, make) in enumerate(makers.items()):
        teachers[name] = folder / f"{name}.pt"
        torch.save(make(seed=i, **SIZES), teachers[name])
    _write_corpus(folder)
    write_workspace(folder)
    write_configs(folder, teachers, folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10, help="of each case (default: 10)")
    args = parser.parse_args()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder)
        for number, (title, case) in enumerate(CASES.items()):
            ends = [end_of(folder, case, f"{number}-{i}") for i in range(args.runs)]
            seconds = sorted(end.seconds for end in ends)
            slowest = max(slowest, seconds[-1])
            codes = sorted({end.code for end in ends})
            print(
                f"{title}: {statistics.median(seconds):.1f} s, at most {seconds[-1]:.1f} s; exit "
                f"codes {codes}; processes left: {sum(end.left for end in ends)}; steps saved: "
                f"{sorted({end.step for end in ends})}",
                flush=True,
            )
    return slowest > LIMIT


if __name__ == "__main__":
    sys.exit(main())
