"""``python -m tests.spoiled_run COMMAND``: s3prl_ekd's command in which something goes wrong.

The environment says what, so that workers which are spawned have it too. SPOILED is ``error`` (a
step fails), ``stuck`` (the workers give no batch any more), ``full`` (there is no shared memory)
or ``signals`` (a step takes for ever); SPOILED_RANK names the process of several that it concerns.
SPOILED_AT is a file that is made when it happens.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from s3prl_ekd.data.batches import DistillationDataset
from s3prl_ekd.distill.distiller import EnsembleDistiller

STEP = 3  # the first that is not as it should be


def spoil(how: str, at: Path) -> None:
    """Patch this process, and those which it forks, until it ends."""
    forward, item = EnsembleDistiller.forward, DistillationDataset.__getitem__
    share = torch.UntypedStorage.share_memory_

    def spoiled_forward(self, *args, step=1, **kwargs):
        if step >= STEP:
            at.touch()
            if how == "error":
                raise RuntimeError("a defect")
            while how == "signals":
                time.sleep(1)
        return forward(self, *args, step=step, **kwargs)

    def spoiled_item(self, index):
        if how == "stuck" and at.exists():
            Path(f"{at}.waiting").touch()
            while True:
                time.sleep(1)
        return item(self, index)

    def spoiled_share(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    EnsembleDistiller.forward = spoiled_forward
    DistillationDataset.__getitem__ = spoiled_item
    torch.UntypedStorage.share_memory_ = spoiled_share if how == "full" else share
    if how == "full":
        torch.UntypedStorage._share_fd_cpu_ = spoiled_share


if os.environ.get("SPOILED_RANK", "0") == os.environ.get("RANK", "0"):
    spoil(os.environ.get("SPOILED", ""), Path(os.environ.get("SPOILED_AT", "")))

if __name__ == "__main__":
    from s3prl_ekd.__main__ import process

    process()
