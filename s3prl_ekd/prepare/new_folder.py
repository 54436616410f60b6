"""Output folders of ``prepare``: written atomically, with relative symlinks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..files.atomic import atomic_folder

PREPARED = "prepared.tsv"  # marks a folder that `prepare` wrote


@contextlib.contextmanager
def new_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to ``out`` if the block ends without an exception.

    The block must write a ``prepared.tsv``: only a folder with one can be replaced later.

    Raises:
        DataError: ``out`` exists and must not be replaced, or cannot be created.
    """
    check_replaceable(out, replace=replace)
    with atomic_folder(out, DataError) as folder:
        yield folder


def check_replaceable(out: Path, *, replace: bool) -> None:
    """Raise DataError if ``out`` has contents, unless `prepare` wrote it and ``replace`` is set."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / PREPARED).is_file():
        raise DataError(f"{out} exists and was not written by `prepare`; use another output folder")
    if not replace:
        raise DataError(f"{out} exists already; to replace it, add --replace")


def link(source: Path, target: Path) -> bool:
    """Make ``target`` a relative symlink to ``source``; return False where symlinks fail."""
    source = source.resolve()
    try:
        pointer = os.path.relpath(source, target.parent.resolve())
    except ValueError:  # another drive
        pointer = str(source)
    try:
        os.symlink(pointer, target, target_is_directory=source.is_dir())
    except OSError:  # a file system without symlinks
        return False
    return True


def link_folder(source: Path, target: Path) -> None:
    """Make ``target`` a symlink to the audio folder ``source``, which is too large to copy.

    Raises:
        DataError: symlinks cannot be made there.
    """
    if not link(source, target):
        raise DataError(
            f"cannot make a symlink to {source} in {target.parent}; use another file system"
        )
