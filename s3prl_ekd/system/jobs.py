"""Processes that a command starts end with it, however it ends.

A command that is killed (``kill -9``, out of memory) cannot stop what it has started. A training
that lived on would write into its folder beside the one that the next command starts there.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection

logger = logging.getLogger(__name__)

PARENT = "S3PRL_EKD_PARENT"  # environment: the process whose end is this one's, too
_LOOK_EVERY = 0.5  # seconds
_TO_SAVE = 30.0  # seconds from SIGTERM to SIGKILL


def child_command(argv: Sequence[str]) -> list[str]:
    """The command of a process for one of our commands, or for ``torchrun``, as a list.

    Args:
        argv: ``run_downstream.py ...``, ``superb ...`` or ``torchrun ...``.
    """
    return [sys.executable, "-m", "s3prl_ekd", *argv]


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of such a process: ``environment`` (default: ours), and who its parent is."""
    return {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """End this process when the one that started it has ended; without such a one, do nothing.

    SIGTERM comes first, so that a run of ``-u ekd`` saves its last step. The variable is removed
    from the environment, so that processes which this one starts do not watch for the same parent.
    Windows does not show a parent's end, and nothing is done there.
    """
    forked = multiprocessing.parent_process()
    number = os.environ.pop(PARENT, None)
    if forked is not None:

        def wait() -> None:
            connection.wait([forked.sentinel])

    elif number is not None and number.isdecimal() and os.name == "posix":

        def wait() -> None:
            while os.getppid() == int(number):
                time.sleep(_LOOK_EVERY)

    else:
        return
    threading.Thread(target=_end_after, args=(wait,), name="parent", daemon=True).start()


def _end_after(wait) -> None:
    wait()
    logger.warning("the process that started this one has ended; this one ends, too")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TO_SAVE)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
