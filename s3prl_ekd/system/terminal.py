"""Standard streams, logging, control characters, and errors as messages and exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

from ..errors import EkdError, SetupError, exit_with, printable


def log_to_stderr(level: int) -> None:
    """Log lines ``LEVEL name: message`` to stderr, unless logging is configured already."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class PrintableFormatter(logging.Formatter):
    """Escape control characters in messages; messages of this package become one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        escape = printable if record.name.startswith("s3prl_ekd") else printable_lines
        record.message = escape(record.message)
        return super().formatMessage(record)


def printable_lines(text: str) -> str:
    """Like :func:`printable`, but keep newlines and tabs."""
    if text.isprintable():
        return text
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


@contextlib.contextmanager
def printable_stdout() -> Iterator[None]:
    """Within the block, escape control characters printed to stdout, except newlines and tabs.

    Callers pass names from untrusted files, which may have newlines, through
    :func:`..errors.printable`.
    """
    with contextlib.redirect_stdout(_PrintableStream(sys.stdout)):
        yield


class _PrintableStream:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable_lines(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_s3prl() -> None:
    """Silence deprecation warnings caused by s3prl's code, its dumps of model configs, and
    huggingface_hub's lines for each request."""
    # torch.cuda.amp and torch.nn.utils.weight_norm, repeated at every step or layer
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.")
    # WavLM's attention passes one bool and one float mask
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    # s3prl's own optimizers
    warnings.filterwarnings("ignore", message="This overload of add_ is deprecated")
    for name in ("s3prl", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


# Exhausted disk or system resources: an error of the system, whichever file it occurs at.
_EXHAUSTED = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE}
_EXHAUSTED |= {getattr(errno, "EDQUOT", errno.ENOSPC)}


def prepare_streams() -> None:
    """Reopen closed standard streams on /dev/null, and escape unencodable characters.

    If a standard stream is closed, the next file opened gets its descriptor, and output would be
    written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (until exit)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # not a real stream, as in tests
            cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def show_errors(interrupted: str = "stopped by Ctrl-C", *, script: bool = False) -> Iterator[None]:
    """Run a command; print expected errors as one line without a traceback, and exit.

    The exit code is 2 after an error, 130 after Ctrl-C. Call :func:`prepare_streams` first.

    Args:
        interrupted: message for Ctrl-C.
        script: the command is a script of s3prl. An OSError about a file, hours later, then has its
            traceback; other commands show a message, as the user has named the file. The exit code
            after a broken pipe (``| head``) is 1; otherwise 0.
    """
    try:
        try:
            yield
        except SystemExit:  # argparse, which has printed --help or its own error
            _flush_stdout()
            raise
        _flush_stdout()
    except EkdError as error:
        exit_with(error)
    except ImportError as error:
        from .packages import missing_package

        if problem := missing_package(error):
            exit_with(SetupError(problem))
        raise
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(int(script)) from None
    except OSError as error:
        if error.errno not in _EXHAUSTED and (script or error.filename is None):
            raise
        exit_with(SetupError(_os_error_message(error)))


def _flush_stdout() -> None:
    if not sys.stdout.closed:  # as python -m json.tool leaves it
        sys.stdout.flush()


def _os_error_message(error: OSError) -> str:
    if error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}: raise the limit with ulimit -n, or set num_workers lower"
    try:
        sys.stdout.flush()
        os.write(1, b"\n")
    except OSError:
        _discard_output()
        return f"cannot write to the standard output: {error.strerror}"
    return f"cannot write: {error.strerror}; free some space and give the same command again"


def _discard_output() -> None:
    """Redirect stdout to /dev/null: Python flushes it at exit, which would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
