"""A pool of processes for QbE's DTW that ends with the run.

s3prl's ``downstream/quesst14_dtw/expert.py`` submits all pairs of a query and a document to a
``ProcessPoolExecutor``, which has two problems:

- After Ctrl-C or an error in one pair, it computes all other pairs before the run ends: an hour.
- If the run is killed, its processes wait for ever, and keep its folder locked.

What DTW cannot compute becomes a sentence.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from types import TracebackType

from ..errors import SetupError, first_line
from .import_hooks import forget_import
from .patched_modules import patch_module

EXPERT = "s3prl.downstream.quesst14_dtw.expert"
_NAME = "ProcessPoolExecutor"


class DtwPool(ProcessPoolExecutor):
    """A pool that drops its tasks on an exception, and whose processes end with their parent.

    A ValueError in the ``with`` block becomes a SetupError.
    """

    def __init__(self, max_workers: int | None = None):
        super().__init__(max_workers, initializer=_end_with_parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown(wait=True, cancel_futures=kind is not None)
        if isinstance(error, ValueError):
            raise SetupError(
                f"DTW failed ({first_line(error)}): hidden states of this layer are not finite, or "
                "dtwrc.dist_method is not known, or without dtwrc.subsequence a document is too "
                "long for a query; choose another layer or edit the YAML"
            ) from None


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def pool_ends_with_run() -> Iterator[None]:
    """Let s3prl's expert use :class:`DtwPool` in a ``with`` block; it is not imported here."""
    patch_module(EXPERT, lambda module: setattr(module, _NAME, DtwPool))
    try:
        yield
    finally:
        forget_import(EXPERT)
        if EXPERT in sys.modules:
            setattr(sys.modules[EXPERT], _NAME, ProcessPoolExecutor)
