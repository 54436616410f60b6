"""The column ``segments`` of a manifest: which phone is spoken when, from forced alignment.

A segment is ``PHONE:START+LENGTH`` in frames of 10 ms; segments are separated by spaces, and
``SIL`` is silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import DataError
from .entries import ManifestEntry

SEGMENTS = "segments"  # the column
SILENCE = "SIL"
TICK = 160  # samples of a frame of an alignment: 10 ms at 16 kHz

_SEGMENT = re.compile(r"([^\s:+]+):(\d{1,9})\+(\d{1,9})")


@dataclass(frozen=True)
class Segment:
    """A phone from ``start`` to ``end`` (exclusive), in samples at 16 kHz."""

    phone: str
    start: int
    end: int


def parse_segments(entry: ManifestEntry) -> tuple[Segment, ...]:
    """The phones of a line of a manifest; none without the column.

    Raises:
        DataError: a segment is not of the form ``PHONE:START+LENGTH``.
    """
    segments = []
    for text in entry.cells.get(SEGMENTS, "").split():
        match = _SEGMENT.fullmatch(text)
        if match is None:
            raise DataError(
                f"{entry.location}: a segment must be PHONE:START+LENGTH in frames of "
                f"10 ms, got {text!r}"
            )
        start = int(match[2]) * TICK
        segments.append(Segment(match[1], start, start + int(match[3]) * TICK))
    return tuple(segments)
