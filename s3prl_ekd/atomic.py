"""Checkpoints whole or not at all, also where s3prl writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
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
        _sync_folder(neighbour.parent)
    finally:
        neighbour.unlink(missing_ok=True)


def save_whole(obj: Any, path: str | os.PathLike, save: Callable[..., None] | None = None) -> None:
    """``torch.save`` to a path, whole or not at all.

    Args:
        obj: what to save.
        path: where to.
        save: ``torch.save`` or what stands for it, ``(obj, file) -> None``.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    try:
        with whole_file(path) as file:
            (save or torch.save)(obj, file)
    except RuntimeError as error:
        # A full disk makes torch's writer fail a second time, while it closes the archive.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def second_name(path: Path, name: Path) -> None:
    """Let the file ``path`` have ``name`` too, in place of what has it now.

    A hard link costs no room; where the file system has none, the contents are copied.

    Raises:
        OSError: neither works; what had the name keeps it.
    """
    neighbour = Path(f"{name}.{os.getpid()}.tmp")
    neighbour.unlink(missing_ok=True)
    try:
        os.link(path, neighbour)
    except OSError:
        with whole_file(name) as file, path.open("rb") as source:
            while block := source.read(1 << 24):
                file.write(block)
        return
    try:
        os.replace(neighbour, name)
        _sync_folder(name.parent)
    finally:
        neighbour.unlink(missing_ok=True)  # renaming one link of a file onto another does nothing


@contextlib.contextmanager
def atomic_saves() -> Iterator[None]:
    """Within it, ``torch.save`` to a path writes a neighbour and renames it.

    s3prl's Runners write straight to the name: a run that is cut while it saves would leave half of
    a checkpoint, and where the name is an old one (``dev-clean-best.ckpt``) the whole one before it
    would be gone.
    """
    save = torch.save

    def save_atomically(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            return save(obj, f, *args, **kwargs)
        save_whole(obj, f, lambda obj, file: save(obj, file, *args, **kwargs))

    torch.save = save_atomically
    try:
        yield
    finally:
        torch.save = save


def _sync_folder(folder: Path) -> None:
    """Ask for the folder's entries to be on the disk: a name is part of its folder, not its file.

    Some file systems refuse to sync folders; nothing is lost then but this certainty.
    """
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
