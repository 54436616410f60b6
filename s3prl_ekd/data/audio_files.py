"""Audio files: which ones lie below a folder, and what their headers say.

Only headers are read here (a few kilobytes a file), by soundfile: FLAC, WAV, Ogg Vorbis, Opus.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile

from ..errors import DataError

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz; every upstream and every recipe of s3prl works at this rate
SUFFIXES = (".flac", ".wav", ".ogg", ".opus")
# Folders that systems make beside people's files; hidden ones (.Trash-1000, .ipynb_checkpoints)
# need no list. macOS's archiver, Synology, QNAP, fsck, Windows.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "lost+found", "$recycle.bin")
) | {"system volume information"}
_PIPED = 0x7FFF0000  # a program that writes to a pipe cannot know, and puts 2**31 or 2**32 or so
_MAX_CHUNKS = 1000  # of a WAV file; a dozen kinds exist
_CHUNK = 64  # files a thread takes at once; one at a time costs more than reading the header
UNKNOWN = 2**40  # libsndfile reports about 2**63 frames where a header does not say


@dataclass(frozen=True)
class AudioHeader:
    """What the header of one audio file says."""

    frames: int  # samples per channel, at the file's own rate
    rate: int  # Hz
    channels: int

    @property
    def samples(self) -> int:
        """Length in samples at 16 kHz."""
        return round(self.frames * SAMPLE_RATE / self.rate)


def is_audio(name: str) -> bool:
    """Whether a file name has one of :data:`SUFFIXES`, in whatever case."""
    return name.lower().endswith(SUFFIXES)


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name below a folder of audio is no part of the corpus.

    That is: it is hidden (``._a.flac`` of macOS, ``.Trash-1000``, ``.ipynb_checkpoints``) or one of
    :data:`SYSTEM_FOLDERS`. The rule is for names that a scan meets; the folder that a user gives,
    and those above it, may have any name, and so may what a link points to.
    """
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def find_audio(folder: str | Path) -> list[str]:
    """Every audio file below ``folder``, as sorted paths relative to it with ``/`` between parts.

    Links to files and folders are followed; a link back to a folder that contains it is not. What
    :func:`is_passed_over` names is not looked at; the log says once how much that was.

    Raises:
        DataError: ``folder`` is not a folder, or a folder below it cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that contains audio")
    passed: list[str] = []
    paths = sorted(_walk(str(folder), "", frozenset(), passed))
    if passed:
        _log_passed_over(str(folder), len(passed), min(passed))
    return paths


@functools.lru_cache(maxsize=1024)  # s3prl builds its datasets again for each pass
def _log_passed_over(folder: str, count: int, first: str) -> None:
    logger.info(
        "%s: %d hidden or system file(s) and folder(s) passed over, such as %s",
        folder,
        count,
        first,
    )


def _walk(folder: str, below: str, above: frozenset[str], passed: list[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads upwards would never end
        return
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
    for entry in entries:
        if is_passed_over(entry.name):
            if entry.is_dir() or is_audio(entry.name):
                passed.append(below + entry.name)
        elif entry.is_dir():
            yield from _walk(entry.path, f"{below}{entry.name}/", above | {real}, passed)
        elif is_audio(entry.name):
            yield below + entry.name


def read_header(path: str | Path) -> AudioHeader:
    """The header of one file.

    Raises:
        DataError: the file is missing, empty, not audio, cut off (where its format tells), or does
            not say how long it is.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    try:
        with soundfile.SoundFile(path) as file:
            header = AudioHeader(file.frames, file.samplerate, file.channels)
            missing = missing_bytes(path, file.format)
    except (soundfile.SoundFileError, OSError) as error:
        raise DataError(f"{path} cannot be read as audio: {reason_of(error)}") from error
    if header.frames == 0:
        raise DataError(f"{path} is empty (a header, and no samples)")
    if header.frames >= UNKNOWN:
        raise DataError(
            f"{path} does not say how long it is (written to a pipe?); convert it to FLAC again"
        )
    if missing:
        raise DataError(f"{path} is cut off: its last {missing} bytes are missing")
    return header


def missing_bytes(path: str | Path, kind: str) -> int:
    """How many bytes a WAV file lacks of the samples that its header announces: libsndfile takes it
    for a shorter one without a word. 0 for other formats, which have other ways to tell.

    Args:
        path: of an audio file.
        kind: soundfile's name of its format.

    Raises:
        OSError: it cannot be read.
    """
    if kind not in ("WAV", "WAVEX"):
        return 0
    with open(path, "rb") as file:
        if file.read(12)[:4] != b"RIFF":
            return 0
        for _ in range(_MAX_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                break
            name, length = struct.unpack("<4sI", head)
            if name == b"data":
                there = os.fstat(file.fileno()).st_size - file.tell()
                return length - there if there < length < _PIPED else 0
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0


def reason_of(error: Exception) -> str:
    """What soundfile says is wrong, without its "Error opening ...:"."""
    return str(getattr(error, "error_string", None) or error).rstrip(".")


def read_headers(
    root: str | Path,
    paths: Sequence[str],
    *,
    jobs: int = 8,
    advance: Callable[[int], object] = lambda done: None,
) -> list[AudioHeader | DataError]:
    """The headers of many files, in the order of ``paths``; an error stands for a bad file.

    Args:
        root: folder that ``paths`` are relative to.
        paths: as :func:`find_audio` gives them.
        jobs: threads. On a disk that answers at once one thread is as fast (about 20 000 files
            a second); on a cold or network disk the waiting overlaps.
        advance: called with the number of files done since the last call, for a progress bar.
    """
    root = str(root)

    def read_chunk(chunk: Sequence[str]) -> list[AudioHeader | DataError]:
        return [_header_or_error(os.path.join(root, path)) for path in chunk]

    found: list[AudioHeader | DataError] = []
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for headers in pool.map(read_chunk, chunks):
            found.extend(headers)
            advance(len(headers))
    return found


def _header_or_error(path: str) -> AudioHeader | DataError:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return DataError(f"{path!r} is not a UTF-8 name, so no table can hold it")
    try:
        return read_header(path)
    except DataError as error:
        return error


def total_hours(samples: Iterable[int]) -> float:
    """The sum of lengths in samples at 16 kHz, as hours."""
    return sum(samples) / SAMPLE_RATE / 3600
