"""Errors that a user can cause; commands show them as one line and exit with code 2."""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType
from typing import NoReturn


def printable(text: str) -> str:
    """Escape ``text`` to one line that is safe to print on a terminal.

    File names and texts from files may contain newlines, terminal escape sequences, bidirectional
    control characters or bytes that are not UTF-8. These become ``\\n``, ``\\x1b``, ...
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class EkdError(Exception):
    """An error that the user can fix; any other exception from this package is a bug.

    The message says what is wrong, where, and how to fix it, in one line of printable characters.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(EkdError):
    """A YAML file or a setting is invalid; the message names the YAML path."""


class TeacherError(EkdError):
    """A teacher cannot be found, loaded or combined with the other teachers."""


class CheckpointError(EkdError):
    """A checkpoint or student file is missing, damaged or not of the expected format."""


class DataError(EkdError):
    """A length table, manifest or audio file cannot be used; the message names the file."""


class SetupError(EkdError):
    """The folder or environment lacks something, or an option is invalid; says what to type."""


def exit_with(error: EkdError) -> NoReturn:
    """Print ``error`` to stderr and exit with code 2."""
    rank = _rank()
    with contextlib.suppress(OSError):  # stderr is closed, or its disk is full
        print(f"error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr)
    raise SystemExit(2)


def _rank() -> int:
    """The rank of this process; 0 without torchrun."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def install_excepthook() -> None:
    """Print an uncaught :class:`EkdError` without a traceback, and exit with code 2.

    For s3prl's scripts when started without our commands (``python run_pretrain.py`` in a
    checkout). Other exceptions go to the previous hook.
    """
    previous = sys.excepthook
    if getattr(previous, "_s3prl_ekd", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, EkdError):
            exit_with(error)
        previous(kind, error, traceback)

    hook._s3prl_ekd = True  # type: ignore[attr-defined]
    sys.excepthook = hook
