"""Find audio files below a folder and read their headers; name parts of them.

Formats: FLAC, WAV, Ogg Vorbis, Opus, MP3. soundfile reads the headers, a few kilobytes a file.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import soundfile
from tqdm import tqdm

from ..errors import DataError
from ..files.text import download_problem
from .bad_audio import BadAudio
from .containers import bytes_after_header, check_complete

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz; s3prl's upstreams and recipes all use it
SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")
# Audio that soundfile cannot read: it has to be converted first.
OTHER_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".amr", ".3gp", ".webm", ".mka", ".m4b")
# Folders created by operating systems and storage devices: macOS's archiver, Synology, QNAP, fsck,
# Windows. Names that start with a dot (._a.flac of macOS, .Trash-1000) are ignored anyway.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "lost+found", "$recycle.bin")
) | {"system volume information"}
# 24 hours, in samples at 16 kHz. A header or a table with a longer length is taken to be wrong.
MAX_SAMPLES = 24 * 3600 * SAMPLE_RATE
_MIN_RATE = 4000  # Hz
_MAX_KERNEL = 2**24  # values of the resampling filter
_UNFINISHED = (
    " according to its header, but {} bytes follow (an interrupted recording?); try to repair it "
    "with: sox --ignore-length IN.wav OUT.flac"
)
_CHUNK = 64  # files in a thread's task; a task for each would cost more than reading the header
# A segment may end this much after its file, in samples: 0.5 s, as Kaldi's extract-segments allows.
# Its end is then the end of the file.
MAX_OVERSHOOT = SAMPLE_RATE // 2
# libsndfile reports about 2**63 frames if the header has no length.
UNKNOWN_FRAMES = 2**40


@dataclass(frozen=True)
class AudioHeader:
    """The header of one audio file."""

    frames: int  # samples per channel, at the file's own rate
    rate: int  # Hz
    channels: int
    warning: str = ""  # see containers.py; usually empty

    @property
    def samples(self) -> int:
        """Length in samples at 16 kHz."""
        return round(self.frames * SAMPLE_RATE / self.rate)


class AudioPart(NamedTuple):
    """An audio file, or a segment of it: ``offset`` and ``length`` in samples at 16 kHz, or None.

    As text it is a unique name: ``talk.wav``, or ``talk.wav@32000+48000`` for a segment.
    """

    path: str | Path
    offset: int | None = None
    length: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.offset is None else f"{self.path}@{self.offset}+{self.length}"

    def samples_of(self, total: int) -> int:
        """The number of samples of this part of a file with ``total`` samples.

        A segment that ends at most :data:`MAX_OVERSHOOT` after the file is cut at its end.

        Raises:
            BadAudio: the segment is not in the file.
        """
        if self.offset is None or self.length is None:
            return total
        end = self.offset + self.length
        if self.offset >= total or end > total + MAX_OVERSHOOT:
            reason = f"it ends at sample {end}, and the file has {total} samples at 16 kHz"
            raise BadAudio(str(self), "not in the file", reason)
        return min(end, total) - self.offset


def is_audio(name: str) -> bool:
    """Whether a file name ends with one of :data:`SUFFIXES`; case is ignored."""
    return name.lower().endswith(SUFFIXES)


def is_hidden_or_system(name: str) -> bool:
    """Whether a scan of a corpus folder ignores a file or folder of this name.

    The rule is for names below the scanned folder. The scanned folder, its parents and the targets
    of links may have any name.
    """
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def find_audio(folder: str | Path) -> list[str]:
    """List every audio file below ``folder``: sorted relative paths, with ``/`` as separator.

    Links to files and folders are followed, unless a link leads back to a folder that contains it.
    Names for which :func:`is_hidden_or_system` is true are ignored. Their number is logged, once
    for each folder, and so is that of files that have to be converted.

    Raises:
        DataError: ``folder`` is not a folder, a folder below it cannot be listed, or all audio
            below it has to be converted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder of audio files")
    ignored: list[str] = []
    others: list[str] = []
    paths = sorted(_walk(str(folder), "", frozenset(), ignored, others))
    if ignored:
        _log_ignored(str(folder), len(ignored), min(ignored))
    if others:
        example = folder / min(others)
        problem = (
            f"{folder}: {len(others)} audio file(s) have a format that cannot be read, e.g. "
            f"{example}; "
            f"convert each with: {ffmpeg_command(example)}"
        )
        if not paths:
            raise DataError(problem)
        _log_others(problem)
    return paths


def ffmpeg_command(path: str | Path) -> str:
    """The command that converts a file to 16 kHz mono FLAC, next to it."""
    source, target = str(path), str(Path(path).with_suffix(".flac"))
    return f"ffmpeg -i {shlex.quote(source)} -ac 1 -ar {SAMPLE_RATE} {shlex.quote(target)}"


@functools.lru_cache(maxsize=1024)
def _log_others(problem: str) -> None:
    logger.warning("%s", problem)


@functools.lru_cache(maxsize=1024)  # once, although s3prl makes its datasets again for each pass
def _log_ignored(folder: str, count: int, example: str) -> None:
    logger.info(
        "%s: ignored %d hidden or system file(s) and folder(s), e.g. %s", folder, count, example
    )


def _walk(
    folder: str, prefix: str, parents: frozenset[str], ignored: list[str], others: list[str]
) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in parents:  # a link to a parent: following it would never end
        return
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
    for entry in entries:
        if is_hidden_or_system(entry.name):
            if entry.is_dir() or is_audio(entry.name):
                ignored.append(prefix + entry.name)
        elif entry.is_dir():
            below = f"{prefix}{entry.name}/"
            yield from _walk(entry.path, below, parents | {real}, ignored, others)
        elif is_audio(entry.name):
            yield prefix + entry.name
        elif entry.name.lower().endswith(OTHER_SUFFIXES):
            others.append(prefix + entry.name)


def read_header(path: str | Path) -> AudioHeader:
    """Read the header of one file. Raises :class:`BadAudio` as :func:`open_audio` does."""
    with open_audio(path) as file:
        return AudioHeader(file.frames, file.samplerate, file.channels, file.warning)


class AudioFile(soundfile.SoundFile):
    """An open audio file that has passed :func:`open_audio`'s checks."""

    warning = ""  # of :func:`.containers.check_complete`; usually empty


def open_audio(path: str | Path) -> AudioFile:
    """Open a file and check everything that can be checked without decoding it.

    ``length-tables`` and training both use this function, so they accept the same files.

    Raises:
        BadAudio: the file is missing, empty, not audio, truncated (:mod:`.containers`), of unknown
            length, longer than a day, or at a sample rate that is not supported.
    """
    try:
        # stat first: soundfile reports any problem as a "System error".
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadAudio(path, "missing", "it is not a file")
        file = AudioFile(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise BadAudio(path, "missing", "there is no such file") from None
    except OSError as error:
        reason = f"it cannot be opened ({error.strerror})"
        raise BadAudio(path, "not readable", reason) from None
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        if status.st_size == 0:
            raise BadAudio(path, "empty", "it is empty (0 bytes)") from None
        if not os.access(path, os.R_OK):
            raise BadAudio(path, "not readable", "you may not read it; see ls -l") from None
        reason = f"is not audio that can be read ({soundfile_message(error)})"
        if str(path).lower().endswith(OTHER_SUFFIXES):
            reason += f"; convert it with: {ffmpeg_command(path)}"
        raise BadAudio(path, "not audio", f"it {download_problem(path) or reason}") from None
    try:
        _check(path, file)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            reason = f"it cannot be read ({error.strerror})"
            raise BadAudio(path, "not readable", reason) from None
        raise
    return file


def _check(path: str | Path, file: AudioFile) -> None:
    if file.frames == 0:
        size = bytes_after_header(path)
        reason = f"it holds no samples{_UNFINISHED.format(size) if size else ''}"
        raise BadAudio(path, "no samples", reason)
    if file.frames >= UNKNOWN_FRAMES:
        reason = "it does not say how long it is (written to a pipe?); convert it to FLAC again"
        raise BadAudio(path, "unknown length", reason)
    file.warning = check_complete(path, file)
    if file.frames > MAX_SAMPLES * file.samplerate / SAMPLE_RATE:
        raise BadAudio(path, "too long", f"its {file.frames} samples are more than a day")
    if not can_be_resampled(file.samplerate):
        reason = f"{file.samplerate} Hz cannot be resampled well to {SAMPLE_RATE} Hz"
        raise BadAudio(path, "rate", reason)


def can_be_resampled(rate: int) -> bool:
    """Whether a rate (Hz) is high enough, and the filter to resample it to 16 kHz small enough."""
    common = math.gcd(rate, SAMPLE_RATE)
    period, new_period = rate // common, SAMPLE_RATE // common
    kernel = new_period * (period + 16 * max(1, period // new_period))
    return rate >= _MIN_RATE and kernel <= _MAX_KERNEL


def soundfile_message(error: Exception) -> str:
    """The message of a soundfile error, without its prefix "Error opening ...:"."""
    return str(getattr(error, "error_string", None) or error).rstrip(".")


def read_headers(
    root: str | Path, paths: Sequence[str], *, jobs: int = 8, bar: bool = False
) -> list[AudioHeader | DataError]:
    """Read the headers of files below ``root``, in order, with an error in place of a bad header.

    Args:
        jobs: threads. On a fast disk one thread is as fast as several (about 20 000 files a
            second); on a cold or network disk several threads overlap their waiting.
        bar: show a progress bar.
    """
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]

    def read_chunk(chunk: Sequence[str]) -> list[AudioHeader | DataError]:
        return [_header_or_error(os.path.join(root, path)) for path in chunk]

    results: list[AudioHeader | DataError] = []
    options = {"unit": " files", "desc": "headers", "delay": 0.3, "dynamic_ncols": True}
    with (
        tqdm(total=len(paths), disable=not bar, **options) as progress,
        ThreadPoolExecutor(max(1, jobs)) as pool,
    ):
        for headers in pool.map(read_chunk, chunks):
            results.extend(headers)
            progress.update(len(headers))
    warnings = [
        f"{path}: {header.warning}"
        for path, header in zip(paths, results, strict=True)
        if isinstance(header, AudioHeader) and header.warning
    ]
    if warnings:
        logger.warning(
            "%d of %d files may be truncated, e.g. %s", len(warnings), len(paths), warnings[0]
        )
    return results


def _header_or_error(path: str) -> AudioHeader | DataError:
    try:
        path.encode("utf-8")
        return read_header(path)
    except UnicodeEncodeError:
        return DataError(f"{path!r}: the file name is not UTF-8, so it cannot be in a table")
    except DataError as error:
        return error


def total_hours(samples: Iterable[int]) -> float:
    """Sum of lengths in samples at 16 kHz, in hours."""
    return sum(samples) / SAMPLE_RATE / 3600
