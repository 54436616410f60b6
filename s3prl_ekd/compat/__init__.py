"""What s3prl 0.4.18 misses on today's torch, torchaudio and huggingface_hub.

Call :func:`apply` before the first ``import s3prl.hub``; the processes that this one starts, such
as DataLoader workers, call it by themselves (:mod:`s3prl_ekd.compat.child_processes`). Each shim
asks first whether its thing is really missing, so on older packages nothing at all is touched.
Importing this module loads none of the packages it mends.
"""

from __future__ import annotations

import logging

from . import audio, checkpoints, names, sox, torchaudio_import
from .audio import audio_decoder
from .checkpoints import checkpoint_globals, loader_holes
from .child_processes import repeat_in_children
from .shim import Shim

__all__ = [
    "SHIMS",
    "Shim",
    "apply",
    "audio_decoder",
    "checkpoint_globals",
    "fired",
    "loader_holes",
]

logger = logging.getLogger(__name__)

# The order matters: what hangs on torchaudio comes after torchaudio itself.
SHIMS: tuple[Shim, ...] = (
    torchaudio_import.IMPORT,
    torchaudio_import.SET_AUDIO_BACKEND,
    audio.LOAD,
    audio.INFO,
    sox.SOX_EFFECTS,
    names.HUGGINGFACE_HUB,
    names.DISTUTILS,
    checkpoints.TORCH_LOAD,
)

_fired: list[str] = []


def apply() -> tuple[str, ...]:
    """Put in place whatever is missing; the log names it (at DEBUG with a line for each thing).

    Calling it again is safe and changes nothing.

    Returns:
        The names of the shims that fired in this process so far, in the order of ``SHIMS``.

    Raises:
        SetupError: torchaudio does not import even without its compiled part.
        ImportError: a package that s3prl needs is not installed.
    """
    now = []
    for shim in SHIMS:
        if shim.missing():
            shim.apply()
            logger.debug("%s: %s (missing since %s)", shim.name, shim.summary, shim.since)
            now.append(shim.name)
    if now:
        logger.info("stand-ins for s3prl: %s (why: s3prl-ekd doctor)", ", ".join(now))
        _fired.extend(name for name in now if name not in _fired)
    repeat_in_children(apply)
    return fired()


def fired() -> tuple[str, ...]:
    """The names of the shims that fired in this process so far."""
    return tuple(shim.name for shim in SHIMS if shim.name in _fired)
