"""Repeat the changes to s3prl in child processes.

With the start methods ``spawn`` (macOS, Windows) and ``forkserver`` (Linux since Python 3.14) a
child is a new interpreter. It unpickles its target, and so imports s3prl's modules, before our code
could run; a DataLoader worker would then fail at ``import torchaudio``. Forked children inherit the
changes and don't need this.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

_KEY = "s3prl_ekd"


def repeat_in_children(function: Callable[..., Any], *args: Any) -> None:
    """Call ``function(*args)`` at the start of each child process and of its children.

    Functions are called in the order of their first registration. If one is registered twice, it is
    called once, with the later arguments.

    Args:
        function: a module-level function, safe to call twice. It and ``args`` are pickled.
    """
    # A process copies its `_config` to its children, which unpickle it before their target and
    # arguments (multiprocessing.process.BaseProcess.__init__). A change in the main module would
    # not be enough: children do not import the main module of `python -m s3prl_ekd` or of a console
    # script on Windows.
    process: Any = multiprocessing.current_process()
    process._config.setdefault(_KEY, _Calls())[function] = args


def forget_in_children(function: Callable[..., Any]) -> None:
    """Undo :func:`repeat_in_children` for children that are started later."""
    process: Any = multiprocessing.current_process()
    process._config.get(_KEY, {}).pop(function, None)


class _Calls(dict):
    """Arguments by function. Unpickling an instance makes the calls."""

    def __reduce__(self) -> tuple:
        return _repeat, (tuple(self.items()),)


def _repeat(calls: tuple) -> _Calls:
    for function, args in calls:
        function(*args)
    return _Calls(calls)
