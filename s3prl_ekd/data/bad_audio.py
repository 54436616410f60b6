"""Which audio files training rejects, and which it accepts with a warning.

Rejected by the header: a missing or unreadable file; one that is not audio or of unknown format,
without samples, without a length (FLAC written to a pipe), longer than a day or shorter than one
frame; a truncated one (:mod:`.containers`); a rate below 4 kHz or with too small a common divisor
with 16 kHz (for 15 999 Hz the filter would take a gigabyte). By the samples: NaN, infinite values,
values beyond 10 (full scale: 1) or damage in the excerpt; a file that is constant to 1e-6.

Used with one warning for each kind: up to 25 ms missing at the end; Ogg without an end-of-stream
mark; several channels (averaged); other rates (resampled); another length than in the table. Used
as they are: peaks of 1 to 10, which float files may have, and a constant excerpt, which is a pause.

``s3prl-ekd length-tables`` also makes the checks of the header, except for one frame, and leaves
bad files out of its tables. ``on_bad_audio: error`` stops the run at the first bad file; ``skip``
trains on the rest of its batch. A bad noise file or impulse response always stops the run, because
a setting names its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import DataError

BAD_AUDIO_ADVICE = (
    "repair or remove it and write the tables again (s3prl-ekd length-tables), or skip bad files: "
    "-o \"config.pretrain_expert.datarc.on_bad_audio='skip'\""
)


class BadUtterance(NamedTuple):
    """An utterance that is left out because its audio is bad."""

    path: str  # as in the table
    kind: str  # see BadAudio
    reason: str


class BadAudio(DataError):
    """An audio file is unusable.

    Args:
        kind: category of the reason, such as ``silent``; one warning is logged for each.
        reason: what is wrong with this file.
    """

    def __init__(self, path: str | Path, kind: str, reason: str):
        super().__init__(f"cannot use the audio file {path}: {reason}")
        self.kind = kind
        self.reason = reason


def too_short_error(path: str | Path, samples: int, min_samples: int) -> BadAudio:
    """The error for a file with fewer than ``min_samples`` (one frame) at 16 kHz."""
    reason = f"{samples} samples at 16000 Hz are too few for one frame ({min_samples})"
    return BadAudio(path, "too short", reason)
