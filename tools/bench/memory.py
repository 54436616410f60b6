"""The peak memory of one side of a benchmark, measured in a process that has no other.

    python -m s3prl_ekd.evaluate.bench_memory PLAN.json SIDE

prints one line of JSON: ``{"peak": bytes, "before": bytes, "kind": "RSS" or "CUDA"}``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from ..errors import SetupError

STEPS = 2  # the optimizer's own tensors come with the first


def peak_memory(plan, side: str) -> dict:
    """Measure in a child process.

    Raises:
        SetupError: the child failed; the message has its last line.
    """
    path = plan.folder / "plan.json"
    path.write_text(json.dumps(asdict(plan), default=str))
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path), side],
        capture_output=True,
        text=True,
        # glibc keeps freed memory for later; of tensors it is to give it back, so that what is
        # measured is what they need.
        env={**os.environ, "PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SetupError(f"the peak memory of {side} could not be measured: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: list[str]) -> int:
    """In the child: make the side, take its largest batch, print the peak."""
    logging.disable(logging.CRITICAL)
    from .. import compat

    compat.apply()
    import torch

    from .bench_clock import Clock
    from .bench_sides import SIDES, Plan

    given = json.loads(Path(argv[0]).read_text())
    given["folder"] = Path(given["folder"])
    plan = Plan(**given)
    side = SIDES[argv[1]](plan)
    cuda = plan.device.startswith("cuda")
    before = torch.cuda.memory_allocated(plan.device) if cuda else resident()
    reset_peak()
    for _ in range(STEPS):
        side.step(0, Clock(lambda: (0.0,)))  # batches go from long to short
    peak = torch.cuda.max_memory_allocated(plan.device) if cuda else peak_resident()
    print(json.dumps({"peak": peak, "before": before, "kind": "CUDA" if cuda else "RSS"}))
    return 0


def resident() -> int:
    """Bytes of memory that this process has now."""
    return _of_status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """The most bytes it has had, since :func:`reset_peak` where the system can do that."""
    peak = _of_status("VmHWM")
    if peak is None:  # not Linux; there ru_maxrss would count the process that started this one
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = usage if sys.platform == "darwin" else usage * 1024
    return peak


def reset_peak() -> None:
    """Forget the peak while the models were loaded, on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _of_status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":")), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
