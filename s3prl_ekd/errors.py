"""The errors a user can cause, and the one way they are shown: a sentence and exit code 2."""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType
from typing import NoReturn


def printable(text: str) -> str:
    """``text`` as one line that is safe on a terminal and in a list of lines.

    Names of files, and texts out of them, may hold newlines, escape sequences, characters that turn
    the direction of writing, or bytes that are no UTF-8. These become ``\\n``, ``\\x1b``, ...
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class EkdError(Exception):
    """Something the user can mend. The message is one sentence that says what, where and how.

    Everything that a user can get wrong (a YAML key, a path, a layer number) is reported by
    this type or a subclass; any other exception out of this package is a defect of ours.

    ``str(error)`` is one line of printable characters, whatever names are in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(EkdError):
    """A YAML file or a setting is not valid; the message names the YAML path."""


class TeacherError(EkdError):
    """A teacher cannot be found, read or combined with the others."""


class CheckpointError(EkdError):
    """A checkpoint or student file is missing, damaged or of another kind."""


class DataError(EkdError):
    """A corpus table or an audio file cannot be used; the message names the file."""


class SetupError(EkdError):
    """The working folder or the environment lacks something; the message says what to type."""


def exit_with(error: EkdError) -> NoReturn:
    """Print the sentence of ``error`` to stderr and leave with exit code 2."""
    number = _rank()
    with contextlib.suppress(OSError):  # the stream is full or closed: the exit code has to do
        print(f"error{f' (process {number})' if number else ''}: {error}", file=sys.stderr)
    raise SystemExit(2)


def _rank() -> int:
    """The number of this process under torchrun; 0 where it is alone."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def install_excepthook() -> None:
    """Show an :class:`EkdError` that nobody catches as its sentence, with exit code 2.

    For s3prl's own scripts started without our commands (``python run_pretrain.py`` in a
    checkout), which let every exception end in a traceback. Other exceptions go to the hook
    that was there before. Calling it twice changes nothing.
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
