"""What makes an audio file unusable in training, and what does not.

==================================  ========  ======================================================
file                                          what becomes of it
==================================  ========  ======================================================
missing, may not be opened          bad
0 bytes; a header and no samples    bad
not audio, of an unknown format     bad
header without a length             bad       a FLAC file written to a pipe
longer than a day                   bad       by its header, or by its table already at the start
cut off                             bad       decided per container, see :mod:`.containers`
damaged                             bad       where the excerpt meets the damage
NaN or infinite samples             bad       where the excerpt has them
samples beyond 10 (full scale is 1) bad       where the excerpt has them; 16-bit numbers as float
no sound                            bad       all of the file is 0, or one other value (to 1e-6);
                                              an excerpt like that is a pause
shorter than one frame              bad       by its own length; by its table's already at the start
below 4 kHz, or a rate that has     bad       15 999 Hz: the filter alone would take a gigabyte
next to nothing in common with ours
clipped, peaks of 1 to 10           used      float files may be like that, and are not scaled
announces up to 25 ms more than     used      its own length counts, one warning
it has; Ogg without an end mark
stereo, more channels               used      averaged, one warning
8, 44.1, 48 kHz and the like        used      resampled, one warning
another length than its table's     used      its own length counts, one warning
an hour                             used      an excerpt of ``sequence_length``; no more is decoded
==================================  ========  ======================================================

What can be told without decoding (to "cut off", and the rate) ``s3prl-ekd lengths`` tells too, and
leaves such files out of its tables. ``on_bad_audio: error`` stops at the first bad file; ``skip``
trains on the rest of its batch. Files of noise and impulse responses, which a setting names, are no
utterances: a bad one always stops.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import DataError

ADVICE = (
    "mend or remove it and remake the tables (s3prl-ekd lengths), or leave such files out: "
    "-o \"config.pretrain_expert.datarc.on_bad_audio='skip'\""
)


class Bad(NamedTuple):
    """An utterance that is left out: its ``path`` as the table has it, and a ``reason`` of one of
    a few ``kind``s."""

    path: str
    kind: str
    reason: str


class BadAudio(DataError):
    """A file cannot be used, and for a reason that lies in the file.

    Args:
        path: of the file.
        kind: one of a few words: a warning is given for the first file of each.
        reason: what is wrong with this one.
    """

    def __init__(self, path: str | Path, kind: str, reason: str):
        super().__init__(f"cannot use the audio file {path}: {reason}")
        self.kind = kind
        self.reason = reason


def too_short(path: str | Path, samples: int, least: int) -> BadAudio:
    """The error for a file of too few samples (at 16 kHz) for one frame."""
    reason = f"{samples} samples at 16000 Hz are too few for one frame ({least})"
    return BadAudio(path, "too short", reason)
