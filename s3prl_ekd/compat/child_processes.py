"""What a process has changed for s3prl, done again in the processes that it starts.

A child of the start methods ``spawn`` (macOS, Windows) and ``forkserver`` (Linux since Python 3.14)
is a fresh interpreter. It unpickles what it is to do, and so imports s3prl's modules, before any
code of ours could run; a DataLoader worker then ends at ``import torchaudio``. Forked children need
nothing of this.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

_KEY = "s3prl_ekd"


def repeat_in_children(function: Callable[..., Any], *args: Any) -> None:
    """Call ``function(*args)`` in each child process, and in theirs, before it does anything else.

    Functions are called in the order in which they were first given; given twice, one is called
    with the later arguments.

    Args:
        function: of a module's top level, safe to call twice. It and ``args`` are pickled.
    """
    # A process hands its `_config` on to its children, ahead of their target and arguments
    # (multiprocessing.process.BaseProcess.__init__). The main module is not enough: children do
    # not import that of `python -m s3prl_ekd` or of a console script on Windows.
    process: Any = multiprocessing.current_process()
    process._config.setdefault(_KEY, _Calls())[function] = args


def forget_in_children(function: Callable[..., Any]) -> None:
    """Undo :func:`repeat_in_children` for the children that are started from now on."""
    process: Any = multiprocessing.current_process()
    process._config.get(_KEY, {}).pop(function, None)


class _Calls(dict):
    """Arguments by function; unpickling it makes the calls."""

    def __reduce__(self) -> tuple:
        return _repeat, (tuple(self.items()),)


def _repeat(calls: tuple) -> _Calls:
    for function, args in calls:
        function(*args)
    return _Calls(calls)
