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

from .audio_files import SAMPLE_RATE, AudioPart, open_audio, soundfile_message
from .bad_audio import BadAudio

logger = logging.getLogger(__name__)

_BLOCK = 2**20  # values decoded at once
# libsndfile does not seek exactly in these encodings: they are decoded from the start.
_INEXACT = ("VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
# torchaudio's resampling filter reaches at most 8 periods of the two rates to each side.
_MARGIN = 8

# Largest accepted absolute sample: 20 dB above full scale. Float files that clip have peaks of 2 or
# 4 and are accepted; 16-bit samples stored as float without scaling reach hundreds.
MAX_PEAK = 10.0
# A file whose samples differ by less (-120 dB; one step of 16 bits is 3e-5) counts as silent.
CONSTANT_TOLERANCE = 1e-6

_warned: set[str] = set()


def read_audio(path: str | Path | AudioPart, *, speech: bool = False) -> Tensor:
    """Read an audio file, or a segment of it, as float32 ``[sample]`` at 16 kHz.

    Channels are averaged and other rates resampled. A process warns once for each number of
    channels and each rate.

    Args:
        speech: reject silent and constant files; set it for utterances, not for noise or impulse
            responses.

    Raises:
        BadAudio: see :mod:`s3prl_ekd.data.bad_audio`; short files are accepted.
    """
    with Recording(path) as recording:
        return recording.read_speech() if speech else recording.read()


class Recording:
    """An open audio file, or segment of it, of which any part can be read; see :func:`read_audio`.

    Attributes:
        samples: length in samples at 16 kHz, by the file's header.

    Raises:
        BadAudio: on entering and on reading.
    """

    def __init__(self, path: str | Path | AudioPart):
        self._part = path if isinstance(path, AudioPart) else AudioPart(path)
        self.path = Path(self._part.path)
        self._offset = self._part.offset or 0

    def __enter__(self) -> Recording:
        self._file = open_audio(self.path)
        if self._file.warning:
            warn_once(f"incomplete {self._file.format}", f"{self.path}: {self._file.warning}")
        common = math.gcd(self._file.samplerate, SAMPLE_RATE)
        # The shortest common period of both rates, in samples at the old and the new rate.
        self._period, self._new_period = self._file.samplerate // common, SAMPLE_RATE // common
        try:
            total = -(-self._file.frames * self._new_period // self._period)
            self.samples = self._part.samples_of(total)
        except BadAudio:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """Read the samples ``[start, start + count)`` at 16 kHz as float32; by default all.

        Only this part is decoded, plus a few milliseconds on both sides if it is resampled. MP3 and
        Vorbis are decoded from the start of the file; the samples before ``start`` are discarded.

        """
        stop = self._offset + (self.samples if count is None else start + count)
        file, start = self._file, self._offset + start
        if file.channels > 1:
            channels = f"{file.channels} channels"
            warn_once(channels, f"{self.path} has {channels}: averaging them")
        if file.samplerate == SAMPLE_RATE:
            return self._check_samples(torch.cat(list(self._blocks(start, stop))))
        rate = f"{file.samplerate} Hz"
        warn_once(rate, f"{self.path} has {rate}: resampling to {SAMPLE_RATE} Hz")
        # Starting and ending at a multiple of the rates' common period keeps the filter's phase the
        # same as over the whole file.
        first_period = max(0, start // self._new_period - _MARGIN)
        end = min(file.frames, (-(-stop // self._new_period) + _MARGIN) * self._period)
        wave = self._check_samples(torch.cat(list(self._blocks(first_period * self._period, end))))
        offset = start - first_period * self._new_period
        return resample(wave, file.samplerate)[offset : offset + stop - start]

    def read_speech(self, start: int = 0, count: int | None = None) -> Tensor:
        """Like :meth:`read`, but reject a silent file or segment.

        If the part that was read is constant, the whole file or segment is checked, block by block.

        Raises:
            BadAudio: as :meth:`read`, or all samples are 0 or one other value.
        """
        wave = self.read(start, count)
        if self._constant and self._is_constant():
            reason = f"it has no sound: every sample is {self._value:.3g}"
            raise BadAudio(str(self._part), "silent", reason)
        return wave

    def _is_constant(self) -> bool:
        first = self._offset * self._period // self._new_period
        end = -(-(self._offset + self.samples) * self._period // self._new_period)
        return all(
            ((block - self._value).abs() <= CONSTANT_TOLERANCE).all()
            for block in self._blocks(first, min(end, self._file.frames))
        )

    def _blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield blocks of samples at the file's own rate, averaged over its channels."""
        file, size = self._file, max(1, _BLOCK // self._file.channels)
        try:
            if file.subtype in _INEXACT and file.tell() != start:
                file.seek(0)
                for position in range(0, start, size):
                    self._decode(min(size, start - position))
            elif file.tell() != start:
                file.seek(start)
            for position in range(start, stop, size):
                block = self._decode(min(size, stop - position))
                yield torch.from_numpy(block).mean(1)
        except (soundfile.SoundFileError, RuntimeError, OSError, ValueError) as error:
            reason = f"it is cut off or damaged ({soundfile_message(error)})"
            raise BadAudio(str(self._part), "damaged", reason) from None

    def _decode(self, frames: int) -> np.ndarray:
        block = self._file.read(frames, dtype="float32", always_2d=True)
        if len(block) < frames:
            reason = f"it is cut off: its header gives {self._file.frames} samples"
            raise BadAudio(str(self._part), "cut off", reason)
        return block

    def _check_samples(self, wave: Tensor) -> Tensor:
        """Check a part of the file, at its own rate, and return it.

        Whether it is constant is also determined here: resampling would leave a ripple.
        """
        wave, self._constant = check_samples(wave, str(self._part))
        self._value = float(wave[0]) if len(wave) else 0.0
        return wave


def check_samples(wave: Tensor, name: str) -> tuple[Tensor, bool]:
    """Check the samples of an utterance; return them and whether they are constant.

    Raises:
        BadAudio: they are not finite, or out of range.
    """
    low, high = map(float, wave.aminmax()) if len(wave) else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadAudio(name, "not finite", "it has samples that are NaN or infinite")
    peak = max(-low, high)
    if peak > MAX_PEAK:
        reason = f"it has samples of {peak:.3g}, and full scale is 1: scale it to -1 to 1"
        raise BadAudio(name, "out of range", reason)
    return wave, high - low <= CONSTANT_TOLERANCE


def resample(wave: Tensor, rate: int) -> Tensor:
    """Resample a waveform from ``rate`` Hz to 16 kHz, in its own precision."""
    from ..compat.torchaudio_functional import functional

    return functional.resample(wave, rate, SAMPLE_RATE)


def warn_once(kind: str, message: str) -> None:
    """Log a warning, once for each ``kind`` in this process."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s (further warnings of this kind are not shown)", message)
