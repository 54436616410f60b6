"""A folder that gets its name when it is whole, and replaces only what it may."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import CheckpointError
from ..files import atomic


@contextlib.contextmanager
def whole_folder(out: Path, force: bool, files: Collection[str]) -> Iterator[Path]:
    """A new folder to write into, which becomes ``out`` at the end if nothing was raised.

    Args:
        out: the folder's name; an empty folder there is no obstacle.
        force: replace a folder that has nothing but ``files`` in it.
        files: the names of what is to be written.

    Raises:
        CheckpointError: ``out`` is in the way, or the folder cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give the name of a folder")
    there = sorted(os.listdir(out)) if out.exists() else []
    if there and not force:
        raise CheckpointError(f"{out} exists; add --force to write over it")
    strange = [name for name in there if name not in files]
    if strange:
        raise CheckpointError(
            f"{out} holds {strange[0]}, which is not of an export: give another name"
        )
    with atomic.whole_folder(out, CheckpointError) as folder:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        for file in folder.iterdir():  # safetensors makes files that only their owner can read
            file.chmod(0o666 & ~mask)
