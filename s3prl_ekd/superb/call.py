"""One command of a downstream run: its environment, its log, and why it failed."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from ..errors import SetupError
from .warm import Processes


def environment_of(slot: int, jobs: int) -> dict[str, str]:
    """Several jobs: each its share of the cores, and a GPU of its own where there are several."""
    if jobs == 1:
        return dict(os.environ)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    changed = {"OMP_NUM_THREADS": threads, **os.environ}
    import torch

    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(count)]
        changed["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    return changed


def run_command(
    folder: Path, words: list[str], environment: Mapping[str, str], processes: Processes
) -> None:
    """Run one command, with all it prints in ``folder/log.txt``.

    Raises:
        SetupError: it failed; with the sentence that it said, or its last line.
    """
    path = folder / "log.txt"
    begin = path.stat().st_size if path.exists() else 0
    code = processes.call(words, path, environment)
    if not code:
        return
    text = path.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
    # its own last word, which a progress bar may have written over as it was closed
    own = ("error: ", "stopped by ")
    said = next((line for line in reversed(text) if line.startswith(own)), None)
    why = said.removeprefix("error: ") if said else (text[-1] if text else "no message")
    if code < 0 and not said:
        why = f"ended by {_signal(-code)}; the last line was: {why}"
    raise SetupError(f"{folder}: {why} (see {path})")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
