"""Measure how long a run takes to end after an error or a signal.

Each run is one process, or two of torchrun. The time ends when the last process has ended.

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

from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.workspace import write_workspace

from .conftest import REPO, write_configs, write_corpus, write_teachers

LIMIT = 10.0  # seconds
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")


@dataclass(frozen=True)
class Case:
    """A way for a run to end.

    Attributes:
        how: what fails, see spoiled_run.py.
        signals: sent to the run, each with the seconds to the next one.
        processes: of the run.
        rank: of the process that fails.
    """

    how: str
    signals: Sequence[tuple[int, float]] = ()
    processes: int = 1
    rank: int = 0


CASES = {
    "an error in a step": Case("error"),
    "SIGTERM while it waits for a batch": Case("stuck", [(signal.SIGTERM, 0)]),
    "SIGINT while it waits for a batch": Case("stuck", [(signal.SIGINT, 0)]),
    "two SIGTERM": Case("endless", [(signal.SIGTERM, 2), (signal.SIGTERM, 0)]),
    "two SIGTERM in native code": Case("native", [(signal.SIGTERM, 2), (signal.SIGTERM, 0)]),
    "an error in the second process of two": Case("error", processes=2, rank=1),
    "SIGTERM while the second of two waits": Case("stuck", [(signal.SIGTERM, 0)], 2, 1),
}


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        seconds: since the error or the last signal.
        code: exit code.
        output: stdout and stderr.
        step: of the last checkpoint.
        left: number of processes still alive.
    """

    seconds: float
    code: int
    output: str
    step: int
    left: int


def end_of(folder: Path, case: Case, name: str = "x", limit: float = 60) -> RunEnd:
    """Run ``case`` in a folder that :func:`write_run` or a test has prepared.

    Raises:
        subprocess.TimeoutExpired: it did not end within ``limit`` seconds and was killed.
    """
    marker, log = folder / f"{name}.marker", folder / f"{name}.log"
    module = [*(TORCHRUN if case.processes > 1 else ()), "tests.spoiled_run", "run_pretrain.py"]
    argv = ["-u", "ekd", "-n", name, "-c", "runner.yaml", "-g", "model.yaml", "--device", "cpu"]
    data, run = "config.pretrain_expert.datarc", "config.runner"
    argv += ["-o", f"{data}.num_workers=2,,{run}.total_steps=1000,,{run}.save_step=900"]
    variables = {
        "SPOILED": case.how,
        "SPOILED_MARKER": str(marker),
        "SPOILED_RANK": str(case.rank),
    }
    paths = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    with open(log, "wb") as file:
        running = subprocess.Popen(
            [sys.executable, "-m", *module, *argv],
            cwd=folder,
            stdout=file,
            stderr=file,
            env={**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )
    processes: list[int] = []
    try:
        while not marker.exists():
            time.sleep(0.02)
            assert running.poll() is None, log.read_text(errors="replace")[-3000:]
        start = marker.stat().st_mtime
        processes = [running.pid, *_descendants(running.pid)]
        if case.signals:
            time.sleep(1.5)  # until the prefetched batches are used
        for number, pause in case.signals:
            start = time.time()
            running.send_signal(number)
            time.sleep(pause)
        code = running.wait(limit)
        seconds = time.time() - start
        time.sleep(0.2)
        left = [pid for pid in processes if _alive(pid)]
    finally:
        for pid in processes:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        running.wait()
    saved = newest_checkpoint(folder / "result/pretrain" / name)
    step = read_checkpoint(saved)["Step"] if saved else 0
    return RunEnd(seconds, code, log.read_text(errors="replace"), step, len(left))


def _descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid for child in map(int, children) for pid in (child, *_descendants(child))]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write_run(folder: Path) -> None:
    """Write teachers, a corpus and the configs of a run."""
    write_workspace(folder)
    write_configs(folder, write_teachers(folder), write_corpus(folder))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10, help="runs of each case (default: 10)")
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
                f"{title}: median {statistics.median(seconds):.1f} s, maximum {seconds[-1]:.1f} s; "
                f"exit codes {codes}; processes left: {sum(end.left for end in ends)}; "
                f"steps saved: {sorted({end.step for end in ends})}",
                flush=True,
            )
    return slowest > LIMIT


if __name__ == "__main__":
    sys.exit(main())
