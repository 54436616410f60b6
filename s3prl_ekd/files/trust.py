"""``--trust-checkpoint``: the one way to read a checkpoint that asks for code. Never a default.

For old files of s3prl or of others, whose pickles name classes beside tensors and plain values.
Loading one runs whatever it says. It counts for the one command that it is typed for, and those
that this one starts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

OPTION = "--trust-checkpoint"
HELP = f"""\
  {OPTION}    load checkpoints that ask for code (old files of s3prl), and run that code;
                        only for files from somebody whom you would let use your account
"""
# What torch.load does where nobody says weights_only, as in s3prl.
_FREE, _STRICT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

_trusted = False


def take(argv: Sequence[str]) -> list[str]:
    """``argv`` without the option; from now on checkpoints are trusted if it was there.

    s3prl's own ``torch.load`` goes by it too: trusted or not, with any torch.
    """
    global _trusted
    _trusted = OPTION in argv
    os.environ.pop(_STRICT if _trusted else _FREE, None)
    if _trusted:
        os.environ[_FREE] = "1"
    return [word for word in argv if word != OPTION]


def trusted() -> bool:
    """Whether checkpoints that ask for code are loaded."""
    return _trusted


def words() -> list[str]:
    """What a command that starts others hands on to them."""
    return [OPTION] if _trusted else []


def restrict_torch() -> None:
    """Have s3prl's own ``torch.load`` read data and nothing else, with any torch.

    torch 2.5 loads weights only where that is asked for, and before 2.10 a file can do harm even
    then: there each file is scanned first, as :func:`.torch_load.safe_load` does.
    """
    import torch

    from ..compat.checkpoints import loader_holes, refuses_by_default

    if not _trusted and not refuses_by_default():
        os.environ[_STRICT] = "1"
    if loader_holes(torch.__version__) and not hasattr(torch.load, "_scans"):
        torch.load = _scanning(torch.load)


def _scanning(load: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load`` that scans a file which it is given by its path, unless it is trusted."""

    @functools.wraps(load)
    def scan_and_load(f: Any, *args: Any, **kwargs: Any) -> Any:
        from .torch_load import scan_for_old_torch

        if not _trusted and isinstance(f, (str, os.PathLike)):
            scan_for_old_torch(f)
        return load(f, *args, **kwargs)

    scan_and_load._scans = True
    return scan_and_load
