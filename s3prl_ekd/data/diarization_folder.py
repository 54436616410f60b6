"""Kaldi folders of s3prl's recipe for diarisation: recordings, and who speaks when in each.

s3prl reads wav.scp, segments, utt2spk and reco2dur; the DER needs rttm. What makes s3prl fail
with a traceback, or label silently wrong, is an error here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..files.text import read_text
from .audio_files import SAMPLE_RATE, AudioPart
from .lengths import MeasuredAudio, measure_audio
from .manifest.kaldi import MAX_BYTES, audio_path
from .rttm import read_rttm

FILES = ("wav.scp", "segments", "utt2spk", "spk2utt", "reco2dur", "rttm")
SHORTEST = 0.1  # seconds of a recording
TOLERANCE = 0.05  # seconds by which reco2dur may differ from the audio
RECEPTIVE_FIELD = 400  # samples; upstreams fail on shorter pieces
# A recording is also the name of a file of predictions
_NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,200}")


@dataclass
class SpokenRecording:
    """A recording and its speakers.

    Attributes:
        location: its line in wav.scp, for messages.
        path: its audio, as in wav.scp: absolute, or relative to the current folder.
        seconds: its length.
        segments: (speaker, begin, end) in seconds.
    """

    location: str
    path: str
    seconds: float
    segments: list[tuple[str, float, float]] = field(default_factory=list)


def read_folder(folder: Path, speakers: int) -> dict[str, SpokenRecording]:
    """Read and check a folder.

    Args:
        speakers: the most speakers of a recording.

    Raises:
        DataError: a file is missing or invalid, or a line is, or the files do not fit together.
    """
    recordings = {}
    durations = {name: _number(cells[0], at) for at, name, cells in _lines(folder / "reco2dur", 2)}
    for location, name, cells in _lines(folder / "wav.scp", 2, rest=True):
        if not _NAME.fullmatch(name):
            raise DataError(
                f"{location}: {name[:60]!r} is no name for a recording: it names a file of "
                "predictions, so it must have no / and not begin with a dot"
            )
        if name not in durations:
            raise DataError(f"{location}: the recording {name} is not in reco2dur")
        if durations[name] < SHORTEST:
            raise DataError(
                f"{folder / 'reco2dur'}: {name} has {durations[name]:g} s; at least {SHORTEST} s "
                "are needed"
            )
        recordings[name] = SpokenRecording(
            location, audio_path(name, cells[0], location), durations[name]
        )
    speaker_of = {name: cells[0] for _, name, cells in _lines(folder / "utt2spk", 2, rest=True)}
    for location, name, cells in _lines(folder / "segments", 4):
        begin, end = _number(cells[1], location), _number(cells[2], location)
        if cells[0] not in recordings:
            raise DataError(f"{location}: the recording {cells[0]} is not in wav.scp")
        if name not in speaker_of:
            raise DataError(f"{location}: the utterance {name} is not in utt2spk")
        if not 0 <= begin < end:
            raise DataError(f"{location}: a segment must end after its begin, got {begin} to {end}")
        recordings[cells[0]].segments.append((speaker_of[name], begin, end))
    for name, recording in recordings.items():
        count = len({speaker for speaker, _, _ in recording.segments})
        if not 0 < count <= speakers:
            raise DataError(
                f"{folder / 'segments'}: {name} has {count} speakers; 1 to {speakers} are allowed"
            )
    return recordings


def check_reference(folder: Path, recordings: dict[str, SpokenRecording]) -> None:
    """Check that a folder's rttm has turns of exactly these recordings.

    Raises:
        DataError: it has others, or cannot be read.
    """
    path = folder / "rttm"
    differing = sorted(read_rttm(path).keys() ^ recordings.keys())
    if differing:
        raise DataError(
            f"{path} and wav.scp have different recordings: {differing[0]} is in only one of them"
        )


def check_audio(recordings: Sequence[SpokenRecording], root: Path = Path(), jobs: int = 8) -> None:
    """Check that audio exists, is 16 kHz mono and as long as reco2dur has it.

    Args:
        root: relative paths start here.

    Raises:
        DataError: names the line of wav.scp.
    """
    parts = [AudioPart(recording.path) for recording in recordings]
    measured = measure_audio(root, parts, jobs=jobs, bar=len(parts) > 1)
    for recording, audio in zip(recordings, measured, strict=True):
        if isinstance(audio, MeasuredAudio) and audio.is_16k_mono:
            seconds = audio.samples / SAMPLE_RATE
            if abs(seconds - recording.seconds) <= TOLERANCE:
                continue
            problem = f"{recording.path} has {seconds:.3f} s, in reco2dur {recording.seconds:.3f} s"
        elif isinstance(audio, MeasuredAudio):
            header = audio.header
            problem = (
                f"{recording.path} must be {SAMPLE_RATE} Hz mono, got {header.rate} Hz with "
                f"{header.channels} channel(s)"
            )
        else:
            problem = str(audio)
        raise DataError(f"{recording.location}: {problem}")


def chunk_problem(recording: SpokenRecording, frames: int, frame_shift: int) -> str:
    """What s3prl does wrong when it cuts a recording to chunks; empty if nothing.

    A last chunk shorter than the window of the upstreams makes them fail. A segment that begins
    before a chunk and ends after it is left out of the chunk's labels.

    Args:
        frames: of a chunk.
        frame_shift: samples of a frame.
    """
    total = int(recording.seconds * SAMPLE_RATE / frame_shift)
    tail = total % frames * frame_shift
    if total > frames and 0 < tail < RECEPTIVE_FIELD:
        return f"its last chunk has {tail} samples, and upstreams need {RECEPTIVE_FIELD}"
    for _, begin, end in recording.segments:
        first, last = (round(time * SAMPLE_RATE / frame_shift) for time in (begin, end))
        chunks = range((first // frames + 1) * frames, total, frames)  # that begin after it
        if any(last > min(start + frames, total) for start in chunks):
            return f"s3prl leaves out its segment from {begin:g} to {end:g} s, which covers a chunk"
    return ""


def write_folder(folder: Path, recordings: dict[str, SpokenRecording]) -> None:
    """Write :data:`FILES` into a new folder.

    Utterances are named ``RECORDING_SPEAKER_NUMBER``. In rttm the segments have a begin and a
    length.
    """
    lines: dict[str, list[str]] = {name: [] for name in FILES}
    utterances: dict[str, list[str]] = {}
    for name, recording in recordings.items():
        lines["wav.scp"].append(f"{name} {recording.path}")
        lines["reco2dur"].append(f"{name} {recording.seconds}")
        for number, (speaker, begin, end) in enumerate(recording.segments):
            utterance = f"{name}_{speaker}_{number:03d}"
            lines["segments"].append(f"{utterance} {name} {begin} {end}")
            lines["utt2spk"].append(f"{utterance} {speaker}")
            utterances.setdefault(speaker, []).append(utterance)
            turn = f"{begin:.3f} {end - begin:.3f} <NA> <NA> {speaker} <NA>"
            lines["rttm"].append(f"SPEAKER {name} 1 {turn}")
    lines["spk2utt"] = [f"{speaker} {' '.join(own)}" for speaker, own in utterances.items()]
    folder.mkdir(parents=True)
    for name, own in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in own), encoding="utf-8")


def _lines(
    path: Path, count: int, *, rest: bool = False
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Yield the location, the first word and the others of each line, ``count`` in all.

    Args:
        rest: the last one is the rest of the line, which may have spaces.
    """
    numbers: dict[str, int] = {}
    lines = read_text(path, "file of a Kaldi folder", DataError, MAX_BYTES).split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        location = f"{path}: line {number}"
        words = line.strip().split(None, count - 1 if rest else -1)
        if len(words) != count:
            raise DataError(f"{location}: expected {count} words, got {line.strip()[:80]!r}")
        first = numbers.setdefault(words[0], number)
        if first != number:
            raise DataError(f"{location}: {words[0]} is also in line {first}")
        yield location, words[0], words[1:]
    if not numbers:
        raise DataError(f"{path} is empty")


def _number(text: str, location: str) -> float:
    try:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise DataError(f"{location}: expected a number of seconds, got {text[:40]!r}") from None
    return value
