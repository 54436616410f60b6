"""Folders that are there whole or not at all, and links in them that can be moved with them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..files.atomic import atomic_folder

PREPARED = "prepared.tsv"  # in every folder that `prepare` has written


@contextlib.contextmanager
def new_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` at the end of the block, if all went well.

    Whoever writes leaves a ``prepared.tsv`` in it: only a folder that has one is ever replaced.

    Raises:
        DataError: ``out`` exists and may not be replaced, or cannot be made.
    """
    check_free(out, replace=replace)
    with atomic_folder(out, DataError) as folder:
        yield folder


def check_free(out: Path, *, replace: bool) -> None:
    """Raise :class:`DataError` unless ``out`` may be written; only a layout is ever replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / PREPARED).is_file():
        raise DataError(f"{out} exists and holds something else; give another folder")
    if not replace:
        raise DataError(f"{out} has been prepared before; add --replace to make it anew")


def link(source: Path, target: Path) -> bool:
    """Make ``target`` a relative link to the file or folder ``source``; False where none can be."""
    source = source.resolve()
    try:
        where = os.path.relpath(source, target.parent.resolve())
    except ValueError:  # another drive
        where = str(source)
    try:
        os.symlink(where, target, target_is_directory=source.is_dir())
    except OSError:  # a file system without links
        return False
    return True


def link_folder(source: Path, target: Path) -> None:
    """Like :func:`link`, for a folder of audio that nobody wants to have copied.

    Raises:
        DataError: links cannot be made there.
    """
    if not link(source, target):
        raise DataError(f"no link to {source} can be made in {target.parent}; choose another disk")
