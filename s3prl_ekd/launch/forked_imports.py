"""What every downstream run imports; the fork server of :mod:`.forked` imports this module alone.

No thread may be started here and no CUDA touched: neither survives a fork. So torch is imported
with one thread, and each child sets its own number. What cannot be imported is left to the command
that needs it, which says so in its log.
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
    with voxceleb1_cache.guarded():
        for name in _MODULES:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """By descriptor: what the imports keep of ``sys.stderr`` must be the real one."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        for number in (1, 2):
            saved = os.dup(number)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, number)
            os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()


os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # read as libraries are loaded
with contextlib.suppress(Exception), warnings.catch_warnings(), _silent():
    warnings.simplefilter("ignore")
    _import_all()
