"""Files and folders that appear under their names only once they are complete; SHA-256 of a file.

Each is written under a temporary name beside its own, ``.NAME.HEX.tmp`` or ``.NAME.HEX.partial``,
with a random HEX, so that no link can have been laid there, and renamed at the end. A killed
command leaves its temporary file behind; the next one that writes the same NAME removes it. Each
process holds an ``flock`` on what it writes, so a file in use is never removed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from ..compat.replaced import replaced
from ..errors import DataError, EkdError, SetupError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing left behind is removed
    fcntl = None  # type: ignore[assignment]

# Ours, and those of version 0.1: NAME.PID.tmp, .NAME.PID.tmp, .NAME.PID.partial.
_TEMPORARY = re.compile(r"\.?(?P<name>.+)\.(?:[0-9a-f]{16}|\d+)\.(?:tmp|partial)")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that gets its name once it is complete; until then the old one stays.

    Args:
        path: where to. The folder exists.
        sync: wait until it is on the disk, and remove what killed commands left of this name; for
            files that are many and easily made again, neither is worth its time.

    Raises:
        OSError: it cannot be written, or is a folder, pipe or device; nothing is left of it.
            ``filename`` is set.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "it is not a plain file, and is not replaced")
        if sync:
            remove_leftovers(path.parent, glob.escape(_short(path.name)))
        temporary, handle = _new_file(path)
        held = os.dup(handle) if fcntl else None  # beyond the file's closing, till it has its name
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(handle)  # the name must not come before the contents
            os.replace(temporary, path)
            if sync:
                _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            if held is not None:
                os.close(held)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, complete or not at all.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_csv(
    path: str | os.PathLike[str], rows: Iterable[Sequence[Any]], line_end: str = "\r\n"
) -> None:
    """Write rows as CSV, complete or not at all. Raises OSError, as :func:`write_text`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=line_end).writerows(rows)  # quotes commas, newlines in names
    write_text(path, text.getvalue())


def save_whole(
    obj: Any, path: str | os.PathLike[str], save: Callable[..., None] | None = None
) -> None:
    """``torch.save`` to a path, complete or not at all.

    Args:
        obj: what to save.
        path: where to.
        save: ``torch.save`` or what stands for it, ``(obj, file) -> None``.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    import torch

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
    temporary = _temporary(name, "tmp")
    try:
        os.link(path, temporary)
    except OSError:
        with whole_file(name) as file, path.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 24)
        return
    try:
        os.replace(temporary, name)
        _sync_folder(name.parent)
    finally:
        temporary.unlink(missing_ok=True)  # renaming one link of a file onto another does nothing


@contextlib.contextmanager
def whole_folder(out: Path, error: type[EkdError] = SetupError) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` at the end of the block if nothing is raised.

    Args:
        out: the folder's name; where it is a link, what it leads to is replaced and the link stays.
            Whatever is there gives way: the caller has checked that it may.
        error: what is raised where the system refuses.

    Raises:
        EkdError: of the class ``error``: the folder cannot be made, filled or renamed.
    """
    target = out.resolve()
    partial = _temporary(target, "partial")
    handle = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, glob.escape(_short(target.name)))
        partial.mkdir()
        handle = _hold(partial)
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync_folder(target.parent)
    except OSError as refused:
        if refused.errno is None:  # not the system's
            raise
        raise error(f"cannot write {out}: {refused.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files and folders that killed commands left.

    Args:
        folder: where they are.
        names: a pattern of the names that they were to get, such as ``*.ckpt``.
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
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is being written
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(handle)


@contextlib.contextmanager
def atomic_saves() -> Iterator[None]:
    """Within it, ``torch.save`` to a path writes a temporary file and renames it.

    s3prl's Runners write straight to the name: a run that is cut while it saves would leave half of
    a checkpoint, and where the name is an old one (``dev-clean-best.ckpt``) the complete one before
    it would be gone.
    """
    import torch

    save = torch.save

    def save_atomically(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            return save(obj, f, *args, **kwargs)
        save_whole(obj, f, lambda obj, file: save(obj, file, *args, **kwargs))

    with replaced(torch, "save", save_atomically):
        yield


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}.{suffix}")


def _short(name: str) -> str:
    """A name that leaves room for a suffix: file systems take 255 bytes."""
    return name if len(os.fsencode(name)) <= 200 else name[:50]


def _new_file(path: Path) -> tuple[Path, int]:
    """A temporary file for ``path``, made by this call and held by this process."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # fails where a link lies, too
    flags |= getattr(os, "O_BINARY", 0)
    while True:
        temporary = _temporary(path, "tmp")
        handle = os.open(temporary, flags, 0o666)
        _flock(handle)
        if os.fstat(handle).st_nlink:  # else another process took it for a leftover just now
            return temporary, handle
        os.close(handle)


def _hold(folder: Path) -> int | None:
    """Hold a folder that is being filled, until the handle is closed; None where none can be."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        _flock(handle)
        return handle
    return None


def _flock(handle: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(handle, fcntl.LOCK_EX)


def _sync_folder(folder: Path) -> None:
    """Ask for the folder's entries to be on the disk: a name is part of its folder, not its file.

    Some file systems refuse to sync folders; only this certainty is lost then.
    """
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: Path, error: type[EkdError] = DataError) -> None:
    """Make a folder and those above it.

    Raises:
        EkdError: of the type ``error``; it cannot be made, and the message says why.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise error(f"cannot make the folder {path}: {problem.strerror}") from None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file is not read as a whole.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
