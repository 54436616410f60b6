"""Atomic writes of files and folders; SHA-256 of a file.

A file is written under a temporary name in the same folder, ``.NAME.HEX.tmp`` (a folder:
``.NAME.HEX.partial``), and renamed when it is complete. HEX is random, so that no link can be
placed there in advance. A killed command leaves its temporary file behind; the next command that
writes the same NAME removes it. The writer holds an ``flock`` on the temporary file, so that a file
in use is never removed.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import hashlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from ..compat.replaced import replaced
from ..errors import DataError, EkdError, SetupError

try:
    import fcntl
except ImportError:  # Windows: no locks, so leftovers are not removed
    fcntl = None  # type: ignore[assignment]

# Our temporary names, and those of version 0.1: NAME.PID.tmp, .NAME.PID.tmp, .NAME.PID.partial.
_TEMPORARY = re.compile(r"\.?(?P<name>.+)\.(?:[0-9a-f]{16}|\d+)\.(?P<suffix>tmp|partial|previous)")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; rename it to ``path`` when the block ends.

    If the block raises, the temporary file is removed, and an existing file at ``path`` stays
    unchanged.

    Args:
        path: the file to write. Its folder must exist.
        sync: flush to disk (fsync), and remove temporary files that killed commands left for this
            name. False for many small files that are easy to recompute.

    Raises:
        OSError: the file cannot be written, or ``path`` is a folder, pipe or device.
            ``filename`` is set.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "not a regular file, so it is not replaced")
        if sync:
            remove_leftovers(path.parent, glob.escape(_short(path.name)))
        temporary, handle = _new_file(path)
        # Keeps the flock after the file is closed, until the rename is done.
        lock_handle = os.dup(handle) if fcntl else None
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(handle)  # contents must be on disk before the rename
            os.replace(temporary, path)
            if sync:
                _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            if lock_handle is not None:
                os.close(lock_handle)
    except OSError as error:
        # name the file that was asked for, not our temporary one
        name = os.path.basename(os.fsdecode(error.filename or ""))
        if error.errno is not None and (not name or _TEMPORARY.fullmatch(name)):
            error.filename, error.filename2 = os.fspath(path), None
        raise


@contextlib.contextmanager
def explain_write_errors(
    path: str | os.PathLike[str], error: type[EkdError] = SetupError
) -> Iterator[None]:
    """Turn an OSError of the operating system into ``error``: cannot write ``path``, and why."""
    try:
        yield
    except OSError as os_error:
        if os_error.errno is None:  # raised by a library
            raise
        raise error(f"cannot write {path}: {os_error.strerror}") from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file with :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_csv(
    path: str | os.PathLike[str], rows: Iterable[Sequence[Any]], line_end: str = "\r\n"
) -> None:
    """Write rows as a CSV file with :func:`atomic_file`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=line_end).writerows(rows)  # quotes commas and newlines
    write_text(path, text.getvalue())


def atomic_torch_save(obj: Any, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """``torch.save`` to a path, with :func:`atomic_file`."""
    import torch

    try:
        with atomic_file(path) as file:
            torch.save(obj, file, *args, **kwargs)
    except RuntimeError as error:
        # On a full disk torch's writer raises again while it closes the archive.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextlib.contextmanager
def patch_torch_save() -> Iterator[None]:
    """Patch ``torch.save`` to write atomically; undone on exit.

    s3prl's Runners write directly to the final name. A run killed while saving would leave a
    truncated checkpoint, and would lose the one it overwrites (``dev-clean-best.ckpt``).
    """
    import torch

    save = torch.save

    def save_atomically(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(f, (str, os.PathLike)):
            atomic_torch_save(obj, f, *args, **kwargs)
        else:
            save(obj, f, *args, **kwargs)

    with replaced(torch, "save", save_atomically):
        yield


def link_or_copy(path: Path, name: Path) -> None:
    """Hard-link the file ``path`` as ``name``, or copy it where hard links are not supported.

    An existing file ``name`` is replaced, or stays unchanged if OSError is raised.
    """
    temporary = _temporary(name, "tmp")
    try:
        os.link(path, temporary)
    except OSError:
        with atomic_file(name) as file, path.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 24)
        return
    try:
        os.replace(temporary, name)
        _sync_folder(name.parent)
    finally:
        temporary.unlink(missing_ok=True)  # rename does nothing if both link to the same file


@contextlib.contextmanager
def atomic_folder(out: Path, error: type[EkdError] = SetupError) -> Iterator[Path]:
    """Make a temporary folder to write into; rename it to ``out`` when the block ends.

    If the block raises, the temporary folder is removed.

    Args:
        out: the folder's final name. An existing folder is replaced; the caller must check that it
            may be. If ``out`` is a symlink, its target is replaced and the link stays.
        error: class of the exception for errors of the operating system.
    """
    target = out.resolve()
    partial, old = _temporary(target, "partial"), _temporary(target, "previous")
    handles: list[int | None] = []
    try:
        with explain_write_errors(out, error):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, glob.escape(_short(target.name)))
            partial.mkdir()
            handles.append(_lock_folder(partial))
            yield partial
            if target.exists():
                handles.append(_lock_folder(target))
                target.rename(old)  # removed last, since this takes long: a kill must not lose both
            try:
                partial.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            _sync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for handle in handles:
            if handle is not None:
                os.close(handle)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files and folders that killed commands left in a folder.

    A previous folder whose replacement was not in place yet gets its name back.

    ``names`` is a glob pattern of their final names, such as ``*.ckpt``.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None or not fnmatchcase(match["name"], names) or entry.is_symlink():
            continue
        path = Path(entry.path)
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if fcntl is None:
                    continue
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if it is being written
                final = path.with_name(match["name"])
                if match["suffix"] == "previous" and not final.exists():
                    path.rename(final)
                elif entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(handle)


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}.{suffix}")


def _short(name: str) -> str:
    """Shorten a name to leave room for a suffix: file systems allow 255 bytes."""
    return name if len(os.fsencode(name)) <= 200 else name[:50]


def _new_file(path: Path) -> tuple[Path, int]:
    """Create and lock a temporary file for ``path``."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # O_EXCL refuses symlinks too
    flags |= getattr(os, "O_BINARY", 0)
    while True:
        temporary = _temporary(path, "tmp")
        handle = os.open(temporary, flags, 0o666)
        _flock(handle)
        if os.fstat(handle).st_nlink:  # 0: another process has removed it as a leftover
            return temporary, handle
        os.close(handle)


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder until the returned handle is closed; None if that is not possible."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        _flock(handle)
        return handle
    return None


def _flock(handle: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)


def _sync_folder(folder: Path) -> None:
    """fsync a folder, so that a new name in it is on disk too; not all file systems can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: Path, error: type[EkdError] = DataError) -> None:
    """Create a folder and its parents; raise ``error`` if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as os_error:
        raise error(f"cannot create the folder {path}: {os_error.strerror}") from None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, read block by block."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
