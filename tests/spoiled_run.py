"""``python -m tests.spoiled_run COMMAND``: an s3prl_ekd command that fails or hangs on purpose.

Controlled by environment variables, which spawned workers inherit:

- SPOILED: ``error`` (a step raises), ``stuck`` (the loader's workers hang), ``endless`` (a step
  hangs in Python) or ``native`` (a step hangs in native code).
- SPOILED_RANK: the rank that fails, of several processes.
- SPOILED_MARKER: a file that is made when the error is raised or the process or worker hangs.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from s3prl_ekd.data.batches import DistillationDataset
from s3prl_ekd.distill.distiller import EnsembleDistiller

STEP = 3  # the first step that fails


def spoil(how: str, marker: Path) -> None:
    """Patch this process; processes that it forks inherit the patch."""
    forward, item = EnsembleDistiller.forward, DistillationDataset.__getitem__
    started = Path(f"{marker}.started")

    def spoiled_forward(self, *args, step=1, **kwargs):
        if step >= STEP:
            started.touch()
            if how == "error":
                marker.touch()
                raise RuntimeError("a defect")
            while how == "endless":
                marker.touch()
                time.sleep(1)
            if how == "native":
                marker.touch()
                libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
                for _ in range(2):
                    libc.pthread_mutex_lock(mutex)  # the second call deadlocks
        return forward(self, *args, step=step, **kwargs)

    def spoiled_item(self, index):
        if how == "stuck" and started.exists():
            marker.touch()
            while True:
                time.sleep(1)
        return item(self, index)

    EnsembleDistiller.forward = spoiled_forward
    DistillationDataset.__getitem__ = spoiled_item


if os.environ.get("SPOILED_RANK", "0") == os.environ.get("RANK", "0"):
    spoil(os.environ.get("SPOILED", ""), Path(os.environ.get("SPOILED_MARKER", "")))

if __name__ == "__main__":
    from s3prl_ekd.__main__ import process

    process()
