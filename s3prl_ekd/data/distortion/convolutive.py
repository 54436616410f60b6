"""Reverberation, pitch shift and band rejection.

Each distortion takes and returns a float32 waveform ``[sample]`` at 16 kHz of the same length.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..audio_files import SAMPLE_RATE
from .sources import is_silent

# Window lengths of the phase vocoder in samples, 30 to 34 ms, and all lengths that it resynthesises
# them to. Their prime factors are at most 11, because FFTs of other lengths are several times
# slower. Neighbouring ratios of two lengths are at most 18 cents apart.
_LENGTHS = [n for n in range(96, 2161, 2) if math.gcd(n, (2 * 3 * 5 * 7 * 11) ** 11) == n]
_PAIRS = [(a, b) for a in _LENGTHS if 480 <= a <= 540 for b in _LENGTHS if a / 4 <= b <= 4 * a]
_PAIR_CENTS = 1200 * np.log2([a / b for a, b in _PAIRS])


def convolve(wave: Tensor, impulse: Tensor) -> Tensor:
    """Convolve two ``[sample]`` and return the first ``len(wave)`` samples.

    By FFTs of blocks that overlap by the length of ``impulse`` (overlap-save), which fit into the
    processor's cache.
    """
    overlap = len(impulse) - 1
    size = max(4096, 1 << (2 * len(impulse) - 1).bit_length())
    step = size - overlap
    padded = pad(wave, (overlap, -len(wave) % step))
    spectra = torch.fft.rfft(padded.unfold(0, size, step)) * torch.fft.rfft(impulse, size)
    return torch.fft.irfft(spectra, size)[:, overlap:].flatten()[: len(wave)]


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


def vocoder_lengths(cents: float) -> tuple[int, int]:
    """Lengths of the window before and after a pitch shift by ``cents``, which is their ratio."""
    return _PAIRS[int(np.abs(_PAIR_CENTS - cents).argmin())]


def shift_pitch(wave: Tensor, cents: float) -> Tensor:
    """Shift the pitch by ``cents`` (1200 per octave) with a phase vocoder; the speed is unchanged.

    Each window's spectrum is transformed back to a window of another length, which shifts its
    frequencies by the ratio of the lengths, and windows are added at the distance that they had.
    The phase of a frequency advances from window to window by its own advance times the ratio. So
    no stretched copy is resampled, as torchaudio does (method: Flanagan and Golden, 1966; this
    order of operations: ours). The shift is within 9 cents of ``cents``.
    """
    before, after = vocoder_lengths(cents)
    if before == after:
        return wave
    hop = 128
    while hop > after / 2.5:
        hop //= 2
    count = -(-len(wave) // hop) + 1
    padded = pad(wave, (before // 2, count * hop + before - len(wave)))
    windows = padded.unfold(0, before, hop)[:count]  # [window, sample]
    bins = min(before, after) // 2 + 1
    spectra = torch.fft.rfft(windows * torch.hann_window(before))[:, :bins]
    real, imag = spectra.real.contiguous(), spectra.imag.contiguous()
    # torch.polar, and abs and angle of complex numbers, are not vectorised on CPUs.
    phase = torch.atan2(imag, real)
    size = real.square_().add_(imag.square_()).sqrt_()
    turn, samples = 2 * math.pi, hop * torch.arange(bins)
    # The advance of a bin's centre frequency modulo one turn, and the deviation from it.
    deviation = phase.diff(dim=0).sub_(samples % before * (turn / before))
    deviation.sub_((deviation / turn).round_(), alpha=turn).mul_(before / after)
    phase[1:] = deviation.add_(samples % after * (turn / after))
    phase.cumsum_(0)
    torch.cos(phase, out=imag)
    spectra.real.copy_(imag.mul_(size))
    spectra.imag.copy_(phase.sin_().mul_(size))
    window = torch.hann_window(after)
    shifted = overlap_add(torch.fft.irfft(spectra, after).mul_(window), hop)
    weight = overlap_add(window.square().expand(count, after), hop).clamp_(min=1e-6)
    return (shifted * (after / before) / weight)[after // 2 :][: len(wave)]


def overlap_add(windows: Tensor, hop: int) -> Tensor:
    """Add windows ``[window, sample]`` at multiples of ``hop`` samples; ``[sample]``."""
    count, length = windows.shape
    total = windows.new_zeros(count + -(-length // hop), hop)
    for i, start in enumerate(range(0, length, hop)):
        part = windows[:, start : start + hop]
        total[i : i + count, : part.shape[1]] += part
    return total.flatten()


def reject_band(wave: Tensor, centre: float, width: float) -> Tensor:
    """Reject a band: zero gain at ``centre`` Hz, -3 dB at edges ``width`` Hz (up to 4000) apart.

    The filter has two poles and two zeros, like ``torchaudio.functional.bandreject_biquad``, whose
    Q gives the width of the analogue prototype: at 6000 Hz only 0.3 of it would be left.
    """
    alpha = math.tan(math.pi * width / SAMPLE_RATE)
    middle = -2 * math.cos(2 * math.pi * centre / SAMPLE_RATE)
    zeros, poles = np.array([1, middle, 1]), np.array([1 + alpha, middle, 1 - alpha])
    decay = np.log(np.abs(np.roots(poles)).max())
    # The impulse response until -120 dB. A centre far below the width gives a slow pole; after a
    # second its response is inaudible.
    ringing = min(math.ceil(math.log(1e-6) / decay) + 2, SAMPLE_RATE)
    response = np.fft.irfft(np.fft.rfft(zeros, 2 * ringing) / np.fft.rfft(poles, 2 * ringing))
    return convolve(wave, torch.from_numpy(response[:ringing]).float())


def _rms(wave: Tensor) -> float:
    return math.sqrt(float(wave.double().square().mean()))
