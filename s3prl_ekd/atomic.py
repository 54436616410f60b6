"""Checkpoints whole or not at all, also where s3prl writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def atomic_saves() -> Iterator[None]:
    """Within it, ``torch.save`` to a path writes a neighbour and renames it.

    s3prl's Runners write straight to the name: a run that is cut while it saves would leave half of
    a checkpoint, and where the name is an old one (``dev-clean-best.ckpt``) the whole one before it
    would be gone.
    """
    save = torch.save

    def save_whole(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            return save(obj, f, *args, **kwargs)
        neighbour = Path(f"{os.fspath(f)}.{os.getpid()}.tmp")
        try:
            with open(neighbour, "wb") as file:
                save(obj, file, *args, **kwargs)
                file.flush()
                os.fsync(file.fileno())  # the name must not come before the contents
            os.replace(neighbour, f)
        finally:
            neighbour.unlink(missing_ok=True)

    torch.save = save_whole
    try:
        yield
    finally:
        torch.save = save
