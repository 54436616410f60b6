"""Reverberation, pitch shift and band rejection.

Each distortion takes and returns a float32 waveform ``[sample]`` at 16 kHz of the same length.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...compat.torchaudio_functional import functional
from ..audio_files import SAMPLE_RATE
from .sources import is_silent

_GRID = 160  # Hz; see shift_pitch
_FRAME = 512  # samples of the phase vocoder's window, 32 ms; torchaudio's default


def convolve(wave: Tensor, impulse: Tensor) -> Tensor:
    """Convolve two ``[sample]`` and return the first ``len(wave)`` samples."""
    # torchaudio's FFT has exactly the length of the result, which is eight times slower if that
    # length has a large prime factor. Padding the impulse with zeros does not change the result.
    padding = -(len(wave) + len(impulse) - 1) % 4096
    return functional.fftconvolve(wave, pad(impulse, (0, padding)))[: len(wave)]


def reverberate(wave: Tensor, impulse: Tensor, direct: int | None = None) -> Tensor:
    """Convolve with an impulse response and scale to the mean square of ``wave``.

    The direct path is moved to time 0, so the speech is not delayed. Everything before it is
    dropped, and so is the tail after the last sample. Keeping the mean square is ours; the level
    then does not depend on the room.

    Args:
        wave: ``[sample]``.
        impulse: ``[sample]``, not silent. The channels of a file are averaged, which adds echoes
            that no room has: use mono files.
        direct: sample of the direct path; by default the one with the largest absolute value.
    """
    if direct is None:
        direct = int(impulse.abs().argmax())
    wet = convolve(wave, impulse[direct:])
    if is_silent(wave) or is_silent(wet):
        return wave
    return wet * (_rms(wave) / _rms(wet))


def simulate_impulse(rt60: float, drr: float, seed: int) -> Tensor:
    """Simulate a room's impulse response ``[sample]``: a direct path at 0, then decaying noise.

    The noise is Gaussian with exponential decay (ours). Unlike measured responses (``impulses``),
    it has no distinct early echoes.

    Args:
        rt60: reverberation time, seconds until the noise has fallen by 60 dB; the response ends
            there.
        drr: direct-to-reverberant energy ratio in dB.
        seed: seed of the noise.
    """
    length = max(2, round(rt60 * SAMPLE_RATE))
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(1, length) / (rt60 * SAMPLE_RATE)  # in units of rt60
    tail = torch.randn(length - 1, generator=generator) * 10 ** (-3 * time)
    tail *= 10 ** (-drr / 20) / torch.linalg.vector_norm(tail)
    return torch.cat([torch.ones(1), tail])


def pitch_percent(cents: float) -> int:
    """Frequency ratio for a pitch shift by ``cents``, rounded to a whole percent."""
    return round(100 * 2 ** (cents / 1200))


def shift_pitch(wave: Tensor, cents: float) -> Tensor:
    """Shift the pitch by ``cents`` (1200 per octave) with a phase vocoder; the speed is unchanged.

    The frequency ratio is rounded to a whole percent (17 cents), because torchaudio resamples from
    a whole number of Hz. If that number has no large common divisor with 16 000, the filter bank
    takes longer than the audio's duration. For multiples of 160 Hz it has 100 filters.
    """
    percent = pitch_percent(cents)
    if percent == 100:
        return wave
    # torchaudio truncates the rate to whole Hz; adding 0.5 guards against rounding errors.
    rate = percent * _GRID + 0.5
    # The STFT reflects half a window at both ends, so the input must be longer than that.
    padded = pad(wave, (0, max(0, _FRAME - len(wave))))
    shifted = functional.pitch_shift(
        padded,
        SAMPLE_RATE,
        1200 * math.log2(rate / SAMPLE_RATE),
        bins_per_octave=1200,
        n_fft=_FRAME,
    )
    return shifted[: len(wave)]


def reject_band(wave: Tensor, centre: float, width: float) -> Tensor:
    """Reject a band: zero gain at ``centre`` Hz, -3 dB at edges ``width`` Hz (up to 4000) apart.

    The filter is torchaudio's second-order one. Without torchaudio's compiled extension it is a
    Python loop over samples. So it is run on an impulse only, for as long as it rings, and the
    response is convolved with the wave, which gives the same result to float32's precision.
    """
    alpha = math.tan(math.pi * width / SAMPLE_RATE)
    poles = np.roots([1 + alpha, -2 * math.cos(2 * math.pi * centre / SAMPLE_RATE), 1 - alpha])
    ringing = math.ceil(math.log(1e-6) / math.log(np.abs(poles).max())) + 2  # until -120 dB
    # A centre far below the width gives a slow pole; after a second its response is inaudible.
    impulse = torch.zeros(min(ringing, SAMPLE_RATE), dtype=torch.float64)
    impulse[0] = 1
    # The filter clamps its output to -1..1, which this response never leaves.
    q = biquad_quality(centre, width)
    response = functional.bandreject_biquad(impulse, SAMPLE_RATE, centre, q)
    return convolve(wave, response.float())


def biquad_quality(centre: float, width: float) -> float:
    """The Q for which the digital filter has ``width`` in Hz.

    ``centre / width`` is the Q of the analogue prototype. The bilinear transform compresses high
    frequencies: at 6000 Hz only 0.3 of the width would be left.
    """
    alpha = math.tan(math.pi * width / SAMPLE_RATE)
    return math.sin(2 * math.pi * centre / SAMPLE_RATE) / (2 * alpha)


def _rms(wave: Tensor) -> float:
    return math.sqrt(float(wave.double().square().mean()))
