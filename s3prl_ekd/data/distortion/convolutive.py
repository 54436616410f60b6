"""What a room, another pitch or a gap in the band does to a waveform.

Each function takes ``[sample]`` at 16 kHz, float32, and returns as many samples.
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
    """The first ``len(wave)`` samples of the convolution of two ``[sample]``."""
    # torchaudio transforms exactly as many samples as the result has. Where that number has a
    # large prime factor this takes eight times as long; zeros after the impulse change nothing.
    spare = -(len(wave) + len(impulse) - 1) % 4096
    return functional.fftconvolve(wave, pad(impulse, (0, spare)))[: len(wave)]


def reverberate(wave: Tensor, impulse: Tensor, direct: int | None = None) -> Tensor:
    """Convolve with an impulse response; the result is as loud (mean square) as ``wave``.

    The direct path is put at time 0, so the words stay where they were; what comes before it is
    dropped, and so is the tail after the last sample. That the loudness stays is ours: the level
    then does not give the room away.

    Args:
        wave: ``[sample]``.
        impulse: ``[sample]``, not silent. A file of several channels arrives as their average,
            which adds echoes that no room has: give mono files.
        direct: where the direct path lies, in samples; by default at the largest sample.
    """
    if direct is None:
        direct = int(impulse.abs().argmax())
    wet = convolve(wave, impulse[direct:])
    if is_silent(wave) or is_silent(wet):
        return wave
    return wet * (_loudness(wave) / _loudness(wet))


def simulate_impulse(rt60: float, drr: float, seed: int) -> Tensor:
    """A simple room ``[sample]``: a direct path at 0, then Gaussian noise that decays
    exponentially (ours).

    There are no distinct early echoes; measured responses (``impulses``) have them.

    Args:
        rt60: seconds until the noise has fallen by 60 dB; the response ends there.
        drr: energy of the direct path over that of the noise, in dB.
        seed: of the noise.
    """
    length = max(2, round(rt60 * SAMPLE_RATE))
    source = torch.Generator().manual_seed(seed)
    time = torch.arange(1, length) / (rt60 * SAMPLE_RATE)  # in units of rt60
    tail = torch.randn(length - 1, generator=source) * 10 ** (-3 * time)
    tail *= 10 ** (-drr / 20) / torch.linalg.vector_norm(tail)
    return torch.cat([torch.ones(1), tail])


def nearest_shift(cents: float) -> int:
    """The shift that :func:`shift_pitch` makes for ``cents``, in percent of the frequency."""
    return round(100 * 2 ** (cents / 1200))


def shift_pitch(wave: Tensor, cents: float) -> Tensor:
    """Shift all frequencies by ``cents`` (1200 an octave) at the same speed; a phase vocoder.

    The shift is rounded to a whole percent of the frequency, 17 cents: torchaudio resamples from
    a whole number of Hz, and where that shares no large divisor with 16 000 its filter bank alone
    takes longer than the audio lasts. On multiples of 160 Hz it has 100 filters.
    """
    percent = nearest_shift(cents)
    if percent == 100:
        return wave
    # torchaudio cuts the rate to a whole number of Hz: aim half a Hz above, not at the edge.
    rate = percent * _GRID + 0.5
    # The transform reflects half a window at both ends, so it needs more than that many samples.
    whole = pad(wave, (0, max(0, _FRAME - len(wave))))
    shifted = functional.pitch_shift(
        whole,
        SAMPLE_RATE,
        1200 * math.log2(rate / SAMPLE_RATE),
        bins_per_octave=1200,
        n_fft=_FRAME,
    )
    return shifted[: len(wave)]


def reject_band(wave: Tensor, centre: float, width: float) -> Tensor:
    """Take out the band around ``centre`` Hz: nothing is left of ``centre`` itself, and the edges,
    3 dB down, are ``width`` Hz apart (up to 4000).

    torchaudio's second-order filter. Without torchaudio's compiled part that filter is a Python
    loop over samples, so it is run on an impulse and the response is convolved with the wave: the
    same result to float32's precision, and the loop is as long as the filter rings.
    """
    impulse = torch.zeros(_ringing(centre, width), dtype=torch.float64)
    impulse[0] = 1
    # The filter clamps to -1..1 by default; of this impulse's response nothing is beyond.
    response = functional.bandreject_biquad(impulse, SAMPLE_RATE, centre, quality(centre, width))
    return convolve(wave, response.float())


def quality(centre: float, width: float) -> float:
    """The Q that gives the digital filter its width in Hz.

    ``centre / width`` holds for the analogue filter behind it; the bilinear transform squeezes
    high frequencies, so that at 6000 Hz only 0.3 of the width would be left.
    """
    alpha = math.tan(math.pi * width / SAMPLE_RATE)
    return math.sin(2 * math.pi * centre / SAMPLE_RATE) / (2 * alpha)


def _ringing(centre: float, width: float) -> int:
    """Samples until the filter's response has fallen by 120 dB, from its slowest pole."""
    alpha = math.tan(math.pi * width / SAMPLE_RATE)
    poles = np.roots([1 + alpha, -2 * math.cos(2 * math.pi * centre / SAMPLE_RATE), 1 - alpha])
    samples = math.ceil(math.log(1e-6) / math.log(np.abs(poles).max())) + 2
    # A centre far below the width makes a slow pole; after a second there is nothing to hear.
    return min(samples, SAMPLE_RATE)


def _loudness(wave: Tensor) -> float:
    return math.sqrt(float(wave.double().square().mean()))
