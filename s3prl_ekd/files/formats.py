"""Versions of the files that this package writes, and the refusal of newer ones."""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..errors import CheckpointError, EkdError

# The parts of a checkpoint that are ours: key -> newest version known here. A file without a
# version is of version 1.
STUDENT, RUN_STATE, RESUME = "EKD", "EKD_Run", "EKD_Resume"
CHECKPOINT_PARTS = {STUDENT: 1, RUN_STATE: 1, RESUME: 1}


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer s3prl_ekd. It is never passed over as damaged."""


def refuse_newer(
    version: Any, known: int, what: str, error: type[EkdError] = NewerFormatError
) -> None:
    """Refuse a file of a newer format; a version that is no number is the reader's business.

    Args:
        version: as the file says.
        known: the newest version that this package reads; it reads all before it.
        what: noun and path of the file, for the message.
        error: what is raised.
    """
    if type(version) is int and version > known:
        reads = "format version 1" if known == 1 else f"format versions 1 to {known}"
        raise error(
            f"{what} has format version {version}, and s3prl_ekd {__version__} reads {reads}; a "
            "newer one is needed, type: pip install --upgrade s3prl_ekd"
        )


def refuse_newer_parts(states: dict[str, Any], path: Any) -> None:
    """Refuse a checkpoint with a newer part of ours in it. Raises NewerFormatError."""
    for key, known in CHECKPOINT_PARTS.items():
        part = states.get(key)
        if isinstance(part, dict):
            refuse_newer(part.get("version", 1), known, f"{key} in the checkpoint {path}")
