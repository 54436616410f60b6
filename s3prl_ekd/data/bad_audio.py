"""Which audio files training rejects, and which it accepts with a warning.

==================================  ========  ======================================================
file                                          details
==================================  ========  ======================================================
missing, or cannot be opened        bad
0 bytes, or header without samples  bad
not audio, or of unknown format     bad
header without a length             bad       e.g. a FLAC file written to a pipe
longer than a day                   bad       by its header; by its table: before training starts
truncated                           bad       depends on the container, see :mod:`.containers`
damaged                             bad       if the damage is in the excerpt
NaN or infinite samples             bad       if they are in the excerpt
samples beyond 10 (full scale: 1)   bad       if in the excerpt; e.g. 16-bit values stored as float
silent                              bad       the whole file is constant (to 1e-6); a constant
                                              excerpt of another file is accepted as a pause
shorter than one frame              bad       by its header; by its table: before training starts
below 4 kHz, or a rate with too     bad       e.g. 15 999 Hz: its filter would take a gigabyte
small a common divisor with 16 kHz
clipped, peaks of 1 to 10           used      possible in float files; they are not scaled
header gives up to 25 ms more       used      the samples in the file are used; one warning
than the file has; Ogg without an
end-of-stream mark
several channels                    used      averaged; one warning
other rates, e.g. 8, 44.1, 48 kHz   used      resampled; one warning
length differs from its table's     used      the file's length is used; one warning
long, e.g. an hour                  used      only an excerpt of ``sequence_length`` is decoded
==================================  ========  ======================================================

``s3prl-ekd length-tables`` also makes the checks that need no decoding (the rows down to
"truncated", and the rate) and leaves bad files out of its tables. ``on_bad_audio: error`` stops the
run at the first bad file; ``skip`` trains on the rest of its batch. A bad noise file or impulse
response always stops the run, because a setting names its folder.
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
        path: the file.
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
