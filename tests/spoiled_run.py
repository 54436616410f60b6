"""``python -m tests.spoiled_run COMMAND``: s3prl_ekd's command in which something goes wrong.

The environment says what, so that workers which are spawned have it too. SPOILED is ``error`` (a
step fails), ``stuck`` (the workers give no batch any more), ``endless`` (a step takes for ever) or
``foreign`` (the same, in code that is not Python's); SPOILED_RANK names the process of several that
it concerns.
SPOILED_AT is a file that is made when the error is raised, or the first worker is stuck.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from s3prl_ekd.data.batches import DistillationDataset
from s3prl_ekd.distill.distiller import EnsembleDistiller

STEP = 3  # the first that is not as it should be


def spoil(how: str, at: Path) -> None:
    """Patch this process, and those which it forks, until it ends."""
    forward, item = EnsembleDistiller.forward, DistillationDataset.__getitem__
    begun = Path(f"{at}.begun")

    def spoiled_forward(self, *args, step=1, **kwargs):
        if step >= STEP:
            begun.touch()
            if how == "error":
                at.touch()
                raise RuntimeError("a defect")
            while how == "endless":
                at.touch()
                time.sleep(1)
            if how == "foreign":
                at.touch()
                libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
                for _ in range(2):
                    libc.pthread_mutex_lock(mutex)  # the second time it waits for itself
        return forward(self, *args, step=step, **kwargs)

    def spoiled_item(self, index):
        if how == "stuck" and begun.exists():
            at.touch()
            while True:
                time.sleep(1)
        return item(self, index)

    EnsembleDistiller.forward = spoiled_forward
    DistillationDataset.__getitem__ = spoiled_item


if os.environ.get("SPOILED_RANK", "0") == os.environ.get("RANK", "0"):
    spoil(os.environ.get("SPOILED", ""), Path(os.environ.get("SPOILED_AT", "")))

if __name__ == "__main__":
    from s3prl_ekd.__main__ import process

    process()
