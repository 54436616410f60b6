"""What reaches the terminal: no control characters, and not what s3prl makes other packages say."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from ..errors import printable


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

    def __getattr__(self, name: str):
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
