"""Format versions of the files that this package writes; newer ones are rejected."""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..errors import CheckpointError, EkdError

# Our parts of a checkpoint: key -> newest version that this package reads. A part without a version
# has version 1.
STUDENT, RUN_STATE, RESUME, UPSTREAM = "EKD", "EKD_Run", "EKD_Resume", "EKD_Upstream"
CHECKPOINT_PARTS = {STUDENT: 3, RUN_STATE: 1, RESUME: 1, UPSTREAM: 1}


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer s3prl_ekd. Never skipped like a damaged one."""


def check_format_version(
    version: Any, supported: int, noun: str, error: type[EkdError] = NewerFormatError
) -> None:
    """Reject a file of a newer format. A version that is not an int is left to the caller.

    Args:
        version: the version in the file.
        supported: the newest version that this package reads; it reads all older ones.
        noun: noun and path of the file, for the message.
        error: class of the exception.
    """
    if type(version) is int and version > supported:
        versions = "format version 1" if supported == 1 else f"format versions 1 to {supported}"
        raise error(
            f"{noun} has format version {version}, but s3prl_ekd {__version__} reads {versions}; "
            "type, in a newer copy of its repository: pip install ."
        )


def check_part_versions(states: dict[str, Any], path: Any) -> None:
    """Reject a checkpoint that contains a part of a newer format. Raises NewerFormatError."""
    for key, supported in CHECKPOINT_PARTS.items():
        part = states.get(key)
        if isinstance(part, dict):
            check_format_version(
                part.get("version", 1), supported, f"{key} in the checkpoint {path}"
            )
