"""Write audio files of 16 kHz."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from .audio_files import SAMPLE_RATE


def write_audio(path: Path, wave: np.ndarray) -> None:
    """Write a waveform ``[sample]`` at 16 kHz in 16 bits, in the format of the suffix.

    Raises OSError.
    """
    path.write_bytes(encode_audio(wave, path.suffix[1:]))


def encode_audio(wave: np.ndarray, kind: str) -> bytes:
    """The contents of an audio file, ``flac`` or ``wav``, of a waveform ``[sample]`` at 16 kHz.

    Encoded in memory, because libsndfile reports a full disk as an unknown error or not at all.
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE, subtype="PCM_16", format=kind)
    return buffer.getvalue()
