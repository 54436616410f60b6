"""Audio files: which ones lie below a folder, and what their headers say.

Only headers are read here (a few kilobytes a file), by soundfile: FLAC, WAV, Ogg Vorbis, Opus.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile

from ..errors import DataError
from ..files.text import download_problem
from .bad_audio import BadAudio
from .containers import Unusable, bytes_behind, check_whole

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz; every upstream and every recipe of s3prl works at this rate
SUFFIXES = (".flac", ".wav", ".ogg", ".opus")
# Folders that systems make beside people's files; hidden ones (.Trash-1000, .ipynb_checkpoints)
# need no list. macOS's archiver, Synology, QNAP, fsck, Windows.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "lost+found", "$recycle.bin")
) | {"system volume information"}
LONGEST = 24 * 3600 * SAMPLE_RATE  # samples; a day. Beyond it a header or a table lies
_MIN_RATE = 4000  # Hz
_MAX_KERNEL = 2**24  # values of the filter that resamples
_UNFINISHED = (
    " by its header, and {} bytes follow it (a recorder that was cut off?); "
    "sox --ignore-length IN.wav OUT.flac may save it"
)
_CHUNK = 64  # files a thread takes at once; one at a time costs more than reading the header
UNKNOWN = 2**40  # libsndfile reports about 2**63 frames where a header does not say


@dataclass(frozen=True)
class AudioHeader:
    """What the header of one audio file says."""

    frames: int  # samples per channel, at the file's own rate
    rate: int  # Hz
    channels: int
    oddity: str = ""  # a warning, see containers.py

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
        BadAudio: see :func:`open_audio`.
    """
    with open_audio(path) as file:
        return AudioHeader(file.frames, file.samplerate, file.channels, file.oddity)


class AudioFile(soundfile.SoundFile):
    """An open audio file that is as long as it says; :attr:`oddity` is a warning, or empty."""

    oddity = ""


def open_audio(path: str | Path) -> AudioFile:
    """Open a file after checking all that can be told without decoding it.

    What makes length tables and what trains open files by this function, so they agree.

    Raises:
        BadAudio: the file is missing, empty, not audio, cut off (:mod:`.containers`), does not say
            how long it is, is longer than a day, or of a rate that is not read.
    """

    def bad(kind: str, reason: str) -> BadAudio:
        return BadAudio(path, kind, reason)

    try:
        # stat first: soundfile calls whatever is wrong a "System error".
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise bad("missing", "it is not a file")
        file = AudioFile(path)
    except (FileNotFoundError, NotADirectoryError):
        raise bad("missing", "there is no such file") from None
    except OSError as error:
        raise bad("not readable", f"it cannot be opened ({error.strerror})") from None
    except ValueError:  # a NUL in the name
        raise bad("missing", "there is no such file") from None
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        if about.st_size == 0:
            raise bad("empty", "it is empty (0 bytes)") from None
        reason = f"is not audio that can be read ({reason_of(error)})"
        raise bad("not audio", f"it {download_problem(path) or reason}") from None
    try:
        if file.frames == 0:
            behind = bytes_behind(path)
            reason = f"it holds no samples{_UNFINISHED.format(behind) if behind else ''}"
            raise bad("no samples", reason)
        if file.frames >= UNKNOWN:
            reason = "it does not say how long it is (written to a pipe?); convert it to FLAC again"
            raise bad("unknown length", reason)
        file.oddity = check_whole(path, file)
        if file.frames > LONGEST * file.samplerate / SAMPLE_RATE:
            raise bad("too long", f"its {file.frames} samples are more than a day")
        if not can_be_resampled(file.samplerate):
            reason = f"{file.samplerate} Hz cannot be resampled well to {SAMPLE_RATE} Hz"
            raise bad("rate", reason)
    except BaseException as error:
        file.close()
        if isinstance(error, Unusable):
            raise bad(error.kind, error.reason) from None
        if isinstance(error, OSError):
            raise bad("not readable", f"it cannot be read ({error.strerror})") from None
        raise
    return file


def can_be_resampled(rate: int) -> bool:
    """Whether a rate (Hz) is high enough, and has enough in common with 16 kHz."""
    common = math.gcd(rate, SAMPLE_RATE)
    period, new = rate // common, SAMPLE_RATE // common
    return rate >= _MIN_RATE and new * (period + 16 * max(1, period // new)) <= _MAX_KERNEL


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
    odd = [
        f"{path}: {header.oddity}"
        for path, header in zip(paths, found, strict=True)
        if isinstance(header, AudioHeader) and header.oddity
    ]
    if odd:
        logger.warning("%d of %d files may lack their end: %s", len(odd), len(paths), odd[0])
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
