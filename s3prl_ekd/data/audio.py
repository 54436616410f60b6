"""Read one utterance, or an excerpt of it, as a 16 kHz mono waveform."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from .audio_files import SAMPLE_RATE, UNKNOWN, missing_bytes, reason_of
from .bad_audio import BadAudio

logger = logging.getLogger(__name__)

_BLOCK = 2**20  # values decoded at once
# Encodings in which libsndfile does not find a place exactly: they are decoded up to it.
_INEXACT = ("VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
# torchaudio's resampling looks at no more than 8 periods of the two rates to each side.
_MARGIN = 8
_MAX_KERNEL = 2**24  # values of its filter
_MIN_RATE = 4000  # Hz

_warned: set[str] = set()


def read_audio(path: str | Path) -> Tensor:
    """Read FLAC, WAV or Opus as float32 ``[sample]`` at 16 kHz.

    Several channels are averaged and other rates resampled, with a warning for the first file of
    each kind in a process.

    Raises:
        BadAudio: see the table in :mod:`s3prl_ekd.data.bad_audio`; silent and short files are read.
    """
    with Recording(path) as recording:
        return recording.read()


class Recording:
    """An open audio file: how long it is, and any part of it; see :func:`read_audio`.

    Attributes:
        samples: its length at 16 kHz, by its header.

    Raises:
        BadAudio: on entering and on reading.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> Recording:
        try:
            # stat first: soundfile calls whatever is wrong a "System error".
            about = os.stat(self.path)
            if not stat.S_ISREG(about.st_mode):
                raise self._bad("missing", "it is not a file")
            self._file = soundfile.SoundFile(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise self._bad("missing", "there is no such file") from None
        except OSError as error:
            raise self._bad("not readable", f"it cannot be opened ({error.strerror})") from None
        except ValueError:  # a NUL in the name
            raise self._bad("missing", "there is no such file") from None
        except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
            if about.st_size == 0:
                raise self._bad("empty", "it is empty (0 bytes)") from None
            reason = f"it is not audio that can be read ({reason_of(error)})"
            raise self._bad("not audio", reason) from None
        try:
            self._check()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise self._bad("not readable", f"it cannot be read ({error.strerror})") from None
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _check(self) -> None:
        frames, rate = self._file.frames, self._file.samplerate
        if frames == 0:
            raise self._bad("no samples", "it holds no samples")
        if frames >= UNKNOWN:
            reason = "it does not say how long it is (written to a pipe?); convert it to FLAC again"
            raise self._bad("unknown length", reason)
        common = math.gcd(rate, SAMPLE_RATE)
        self._period, self._new = rate // common, SAMPLE_RATE // common
        kernel = self._new * (self._period + 16 * max(1, self._period // self._new))
        if rate < _MIN_RATE or kernel > _MAX_KERNEL:
            raise self._bad("rate", f"{rate} Hz cannot be resampled well to {SAMPLE_RATE} Hz")
        if missing := missing_bytes(self.path, self._file.format):
            raise self._bad("cut off", f"it is cut off: its last {missing} bytes are missing")
        self.samples = -(-frames * self._new // self._period)

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """The samples ``[start, start + count)`` at 16 kHz, float32 ``[sample]``; all by default.

        No more than that is decoded, some milliseconds about it where it is resampled; MP3 and
        Vorbis from their begin on, of which nothing is kept.
        """
        file, stop = self._file, self.samples if count is None else start + count
        if file.channels > 1:
            said = f"{file.channels} channels"
            warn_once(said, f"{self.path} has {said}: averaged")
        if file.samplerate == SAMPLE_RATE:
            return self._finite(torch.cat(list(self._blocks(start, stop))))
        said = f"{file.samplerate} Hz"
        warn_once(said, f"{self.path} has {said}: resampled to {SAMPLE_RATE} Hz")
        # From and to a multiple of the period that both rates have in common, the filter falls on
        # the same places as it would over the whole file.
        first = max(0, start // self._new - _MARGIN)
        last = min(file.frames, (-(-stop // self._new) + _MARGIN) * self._period)
        wave = self._finite(torch.cat(list(self._blocks(first * self._period, last))))
        offset = start - first * self._new
        return _resample(wave, file.samplerate)[offset : offset + stop - start]

    def is_silent(self) -> bool:
        """Whether every sample of the file is 0; read from its begin, block by block."""
        return not any(block.any() for block in self._blocks(0, self._file.frames))

    def _blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Frames of the file, averaged over its channels, at its own rate, block by block."""
        file, size = self._file, max(1, _BLOCK // self._file.channels)
        try:
            if file.subtype in _INEXACT and file.tell() != start:
                file.seek(0)
                for at in range(0, start, size):
                    self._decode(min(size, start - at))
            elif file.tell() != start:
                file.seek(start)
            for at in range(start, stop, size):
                block = self._decode(min(size, stop - at))
                yield torch.from_numpy(block).mean(1)
        except (soundfile.SoundFileError, RuntimeError, OSError, ValueError) as error:
            reason = f"it is cut off or damaged ({reason_of(error)})"
            raise self._bad("damaged", reason) from None

    def _decode(self, frames: int) -> np.ndarray:
        block = self._file.read(frames, dtype="float32", always_2d=True)
        if len(block) < frames:
            raise self._bad("cut off", f"it is cut off: {self._file.frames} samples are announced")
        return block

    def _finite(self, wave: Tensor) -> Tensor:
        if not wave.isfinite().all():
            raise self._bad("not finite", "it has samples that are NaN or infinite")
        return wave

    def _bad(self, kind: str, reason: str) -> BadAudio:
        return BadAudio(self.path, kind, reason)


def _resample(wave: Tensor, rate: int) -> Tensor:
    from .. import compat

    compat.apply()
    from torchaudio.functional import resample

    return resample(wave, rate, SAMPLE_RATE)


def warn_once(kind: str, message: str) -> None:
    """A warning for the first file of a kind in this process."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s (said once for files of this kind)", message)
