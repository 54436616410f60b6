"""Write an export folder atomically, without replacing files that no export wrote."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import CheckpointError
from ..files import atomic


@contextlib.contextmanager
def export_folder(out: Path, force: bool, files: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``out`` if the block raises nothing.

    Args:
        out: may be an existing empty folder.
        force: replace an existing folder that contains only ``files``.
        files: names of the files that the export writes.

    Raises:
        CheckpointError: ``out`` exists and may not be replaced, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder")
    existing = sorted(os.listdir(out)) if out.exists() else []
    if existing and not force:
        raise CheckpointError(f"{out} exists; add --force to write over it")
    other_files = [name for name in existing if name not in files]
    if other_files:
        raise CheckpointError(
            f"{out} contains {other_files[0]}, which this export does not write; name another "
            "folder"
        )
    with atomic.atomic_folder(out, CheckpointError) as folder:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        for file in folder.iterdir():  # safetensors creates files that only their owner can read
            file.chmod(0o666 & ~mask)
