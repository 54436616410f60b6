"""Read one utterance, or an excerpt of it, as a 16 kHz mono waveform."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from .audio_files import SAMPLE_RATE, open_audio, reason_of
from .bad_audio import BadAudio

logger = logging.getLogger(__name__)

_BLOCK = 2**20  # values decoded at once
# Encodings in which libsndfile does not find a place exactly: they are decoded up to it.
_INEXACT = ("VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
# torchaudio's resampling looks at no more than 8 periods of the two rates to each side.
_MARGIN = 8

# 20 dB above full scale. Float files that clip, or that were mixed hot, are used, and these have
# peaks of 2 or 4; 16-bit samples that were stored as float without scaling reach hundreds.
LOUDEST = 10.0
FLAT = 1e-6  # samples that differ by less (-120 dB; the last of 16 bits is 3e-5) are no sound

_warned: set[str] = set()


def read_audio(path: str | Path, *, speech: bool = False) -> Tensor:
    """Read FLAC, WAV or Opus as float32 ``[sample]`` at 16 kHz.

    Several channels are averaged and other rates resampled, with a warning for the first file of
    each kind in a process.

    Args:
        path: of the file.
        speech: a file without sound is bad, too; noises and impulse responses are read.

    Raises:
        BadAudio: see the table in :mod:`s3prl_ekd.data.bad_audio`; short files are read.
    """
    with Recording(path) as recording:
        return recording.read_speech() if speech else recording.read()


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
        self._file = open_audio(self.path)
        if self._file.oddity:
            warn_once(f"odd {self._file.format}", f"{self.path}: {self._file.oddity}")
        common = math.gcd(self._file.samplerate, SAMPLE_RATE)
        self._period, self._new = self._file.samplerate // common, SAMPLE_RATE // common
        self.samples = -(-self._file.frames * self._new // self._period)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

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
            return self._in_range(torch.cat(list(self._blocks(start, stop))))
        said = f"{file.samplerate} Hz"
        warn_once(said, f"{self.path} has {said}: resampled to {SAMPLE_RATE} Hz")
        # From and to a multiple of the period that both rates have in common, the filter falls on
        # the same places as it would over the whole file.
        first = max(0, start // self._new - _MARGIN)
        last = min(file.frames, (-(-stop // self._new) + _MARGIN) * self._period)
        wave = self._in_range(torch.cat(list(self._blocks(first * self._period, last))))
        offset = start - first * self._new
        return _resample(wave, file.samplerate)[offset : offset + stop - start]

    def read_speech(self, start: int = 0, count: int | None = None) -> Tensor:
        """Like :meth:`read`; besides, a file without sound is bad.

        Raises:
            BadAudio: every sample of the file, read block by block, is 0, or has one other value.
        """
        wave = self.read(start, count)
        if self._constant and self._is_constant():
            if not self._value:
                raise self._bad("silent", "it is digital silence from begin to end")
            raise self._bad("silent", f"it has no sound: every sample is {self._value:.3g}")
        return wave

    def _is_constant(self) -> bool:
        return all(
            ((block - self._value).abs() <= FLAT).all()
            for block in self._blocks(0, self._file.frames)
        )

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

    def _in_range(self, wave: Tensor) -> Tensor:
        """A part of the file, at its own rate; and whether it is constant, which is looked at here,
        as resampling leaves a ripple."""
        low, high = map(float, wave.aminmax()) if len(wave) else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise self._bad("not finite", "it has samples that are NaN or infinite")
        peak = max(-low, high)
        if peak > LOUDEST:
            reason = f"it has samples of {peak:.3g}, and full scale is 1: scale it to -1 to 1"
            raise self._bad("out of range", reason)
        self._constant, self._value = high - low <= FLAT, low
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
