"""Shims that let s3prl 0.4.18 run with current torch, torchaudio and huggingface_hub.

Call :func:`apply` before the first ``import s3prl.hub``. Child processes, such as DataLoader
workers, call it automatically (:mod:`s3prl_ekd.compat.child_processes`). Each shim checks first
whether its attribute is missing, so older packages are not changed. Importing this module does not
import the packages that it patches.
"""

from __future__ import annotations

import logging

from ..system.s3prl_distribution import announce_s3prl
from . import audio, catalyst, checkpoints, names, sox, torchaudio_import
from .audio import audio_decoder
from .checkpoints import checkpoint_globals, torch_load_cves
from .child_processes import repeat_in_children
from .shim import Shim

__all__ = [
    "SHIMS",
    "Shim",
    "apply",
    "apply_shims",
    "audio_decoder",
    "checkpoint_globals",
    "fired",
    "torch_load_cves",
    "torchaudio_repair",
]

logger = logging.getLogger(__name__)

# The order matters: the shims that need torchaudio come after the one that makes it importable.
SHIMS: tuple[Shim, ...] = (
    torchaudio_import.IMPORT,
    torchaudio_import.SET_AUDIO_BACKEND,
    audio.LOAD,
    audio.INFO,
    sox.SOX_EFFECTS,
    names.HUGGINGFACE_HUB,
    names.DISTUTILS,
    checkpoints.TORCH_LOAD,
    catalyst.CATALYST,
)

_fired: list[str] = []


def apply() -> tuple[str, ...]:
    """Apply the shims that are needed, and log their names (at DEBUG one line each).

    Before, :func:`..system.s3prl_distribution.announce_s3prl`. Further calls change nothing.

    Returns:
        The names of all shims applied in this process, in the order of ``SHIMS``.

    Raises:
        SetupError: s3prl is not installed, or torchaudio cannot be imported, even without its
            compiled extension.
        ImportError: a package that s3prl needs is not installed.
    """
    announce_s3prl()
    return apply_shims()


def apply_shims() -> tuple[str, ...]:
    """:func:`apply` for a report: s3prl may be missing."""
    applied = []
    for shim in SHIMS:
        if shim.missing():
            shim.apply()
            logger.debug("%s: %s (missing since %s)", shim.name, shim.summary, shim.since)
            applied.append(shim.name)
            _fired.append(shim.name)
    if applied:
        logger.info(
            "compatibility shims for s3prl: %s (details: s3prl-ekd doctor)", ", ".join(applied)
        )
    repeat_in_children(apply)
    return fired()


def fired() -> tuple[str, ...]:
    """The names of all shims applied in this process, in the order of ``SHIMS``."""
    return tuple(shim.name for shim in SHIMS if shim.name in _fired)


def torchaudio_repair() -> str:
    """How to make torchaudio importable in other programs, which have no shims; empty if it is."""
    return torchaudio_import.repair() if torchaudio_import.IMPORT.name in fired() else ""
