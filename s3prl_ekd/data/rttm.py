"""RTTM files: who speaks when in a recording.

A line is ``SPEAKER RECORDING CHANNEL BEGIN SECONDS <NA> <NA> NAME <NA>``, in some files with one
more ``<NA>``.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from ..files.text import read_text

MAX_BYTES = 1 << 28
MAX_SECONDS = 1e6
MAX_SPEAKERS = 8  # of a recording: its scoring tries every mapping of the speakers

# Speaker -> turns (begin, length) in seconds, in the order of the file
SpeakerTurns = dict[str, list[tuple[float, float]]]


def read_rttm(path: Path) -> dict[str, SpeakerTurns]:
    """Read the turns of each recording.

    Raises:
        DataError: the file cannot be read or has no turns, or a line is invalid.
    """
    recordings: dict[str, SpeakerTurns] = {}
    lines = read_text(path, "RTTM file", DataError, MAX_BYTES, "utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        cells = line.split()
        if not cells or cells[0] == "SPKR-INFO":
            continue
        try:
            if cells[0] != "SPEAKER" or len(cells) < 9:
                raise ValueError
            begin, seconds = float(cells[3]), float(cells[4])
            if not (0 <= begin < MAX_SECONDS and 0 < seconds < MAX_SECONDS):
                raise ValueError
        except ValueError:
            raise DataError(
                f"{path}: line {number}: expected 'SPEAKER RECORDING 1 BEGIN SECONDS <NA> <NA> NAME"
                f" <NA>' with BEGIN from 0 on and SECONDS above 0, got {line.strip()[:80]!r}"
            ) from None
        recordings.setdefault(cells[1], {}).setdefault(cells[7], []).append((begin, seconds))
    if not recordings:
        raise DataError(f"{path} has no speaker turns")
    return recordings
