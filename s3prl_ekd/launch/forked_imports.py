"""Preload the imports of downstream runs in the fork server of :mod:`.forked`.

Threads and CUDA do not survive a fork, so none may be started here. torch is imported with one
thread, and each child sets its own number. An import that fails here is skipped: it fails again,
with its message, in the command that needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator

_MODULES = (
    "s3prl_ekd.downstream.resume",
    "s3prl_ekd.downstream.noise",
    "s3prl_ekd.downstream.feature_cache",
    "s3prl.downstream.ctc.expert",
    "s3prl.downstream.asr.expert",
    "s3prl.downstream.emotion.expert",
    "s3prl.downstream.voxceleb1.expert",
)


def _import_all() -> None:
    from s3prl_ekd import launch
    from s3prl_ekd.compat import voxceleb1_cache

    launch.import_script("run_downstream")
    with voxceleb1_cache.cache_bypassed():
        for name in _MODULES:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence output by descriptor: imports may store ``sys.stderr``, so it must not change."""
    with open(os.devnull, "w") as devnull, contextlib.ExitStack() as stack:
        for number in (1, 2):
            saved = os.dup(number)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, number)
            os.dup2(devnull.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()


os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # read when the libraries are loaded
with contextlib.suppress(Exception), warnings.catch_warnings(), _silent():
    warnings.simplefilter("ignore")
    _import_all()
