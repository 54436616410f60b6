"""Read one utterance as a 16 kHz mono waveform."""

from __future__ import annotations

import logging
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from ..errors import DataError
from .audio_files import SAMPLE_RATE

logger = logging.getLogger(__name__)


_warned: set[str] = set()


def read_audio(path: str | Path) -> Tensor:
    """Read FLAC, WAV or Opus as float32 ``[sample]`` at 16 kHz.

    Several channels are averaged and other rates resampled, with a warning for the first file of
    each kind in a process.

    Raises:
        DataError: the file is missing, empty or no audio.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"cannot read the audio file {path}: there is no such file")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError) as error:
        reason = "it is empty" if path.stat().st_size == 0 else str(error).split(": ")[-1]
        raise DataError(f"cannot read the audio file {path}: {reason}") from None
    if len(samples) == 0:
        raise DataError(f"cannot use the audio file {path}: it holds no samples")
    wave = torch.from_numpy(samples)
    if wave.shape[1] > 1:
        _warn_once(f"{wave.shape[1]} channels", f"{path} has {wave.shape[1]} channels: averaged")
    wave = wave.mean(1)
    if rate != SAMPLE_RATE:
        _warn_once(f"{rate} Hz", f"{path} has {rate} Hz: resampled to {SAMPLE_RATE} Hz")
        wave = _resample(wave, rate)
    return wave


def _resample(wave: Tensor, rate: int) -> Tensor:
    from .. import compat

    compat.apply()
    from torchaudio.functional import resample

    return resample(wave, rate, SAMPLE_RATE)


def _warn_once(kind: str, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s (said once for files of this kind)", message)
