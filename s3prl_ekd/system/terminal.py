"""What a command prints: streams, control characters, other packages' messages, its exit code."""

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
    """``LEVEL name: message``, a line each, unless a log has been set up before."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class PlainFormatter(logging.Formatter):
    """Messages without control characters; those of this package are one line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        plain = printable if record.name.startswith("s3prl_ekd") else printable_lines
        record.message = plain(record.message)
        return super().formatMessage(record)


def printable_lines(text: str) -> str:
    """Like :func:`printable`, but newlines and tabs stay."""
    if text.isprintable():
        return text
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


@contextlib.contextmanager
def plain_stdout() -> Iterator[None]:
    """Within the block what is printed has no control characters but newlines and tabs.

    A newline in a name cannot be told from one of ours here: lines that hold names out of files
    pass them through :func:`..errors.printable` first.
    """
    with contextlib.redirect_stdout(_PlainStream(sys.stdout)):
        yield


class _PlainStream:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable_lines(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_s3prl() -> None:
    """Silence deprecations that s3prl cannot mend in a run, and its dumps of model configs."""
    # torch.cuda.amp and torch.nn.utils.weight_norm, said anew at every step or layer
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.")
    # WavLM's attention passes a bool mask beside a float one
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    # s3prl's own optimizers
    warnings.filterwarnings("ignore", message="This overload of add_ is deprecated")
    logging.getLogger("s3prl").setLevel(logging.WARNING)


# The disk or the machine has no more of something, whatever file that shows at.
_EXHAUSTED = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE}
_EXHAUSTED |= {getattr(errno, "EDQUOT", errno.ENOSPC)}


def prepare_streams() -> None:
    """Open the standard streams that are closed, and let none fail on a character.

    A closed one leaves its number to the first file that is opened, and what the command prints
    would go there. Characters that the encoding of the terminal lacks are printed as escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (till the end)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stand-in, as in tests
            cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def errors_shown(
    interrupted: str = "stopped by Ctrl-C", broken_pipe: int = 0, *, files_are_typed: bool = True
) -> Iterator[None]:
    """Within it a command runs; what a user or the machine can cause is shown as one sentence.

    The standard streams have been prepared (:func:`prepare_streams`).

    Args:
        interrupted: what Ctrl-C prints.
        broken_pipe: the exit code where nothing reads the output any more, as behind ``| head``.
        files_are_typed: a file that cannot be used is one that the user named, and no traceback is
            needed; hours into a run of s3prl's, it is.

    Raises:
        SystemExit: with 2, after an :class:`EkdError` or a refusal of the system; with 130, after
            Ctrl-C; with ``broken_pipe``.
    """
    try:
        yield
        sys.stdout.flush()
    except EkdError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(broken_pipe) from None
    except OSError as error:
        if error.errno not in _EXHAUSTED and not (files_are_typed and error.filename is not None):
            raise
        exit_with(SetupError(_refusal(error)))


def _refusal(error: OSError) -> str:
    """What the system refused, and of which file."""
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
    return f"cannot write: {error.strerror}; make room and give the same command again"


def _discard_output() -> None:
    """Send to nowhere what Python would flush, and fail to, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
