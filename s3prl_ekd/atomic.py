"""Checkpoints whole or not at all, also where s3prl writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to that has its name only once it is whole; what was there stays till then.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    neighbour = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        with open(neighbour, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the name must not come before the contents
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)


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
        with whole_file(f) as file:
            save(obj, file, *args, **kwargs)

    torch.save = save_whole
    try:
        yield
    finally:
        torch.save = save
