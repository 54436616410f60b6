"""Pitch and energy of each frame, clustered for the prosody teacher (ours).

With k-means units of these four numbers in place of MFCC, masked prediction learns intonation and
stress, without labels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from s3prl_ekd import compat

from .frames import HOP, WINDOW, frame_count

DIM = 4
LOWEST, HIGHEST = 60, 500  # Hz
_SILENCE_DB = 35.0  # below the loudest frame; the pitch of quieter frames is interpolated
_DELTA_FRAMES = 11  # frames of a slope: 200 ms from the first to the last
# Divisors that give the four dimensions similar weight: octaves, bels, and their slopes per frame
_SCALE = (0.5, 1.0, 0.05, 0.1)


def prosody(wave: Tensor) -> Tensor:
    """Compute log2 pitch, log10 energy and their slopes over 200 ms.

    Args:
        wave: ``[sample]`` at 16 kHz, 400 samples or more.

    Returns:
        ``[frame, 4]``, a frame every 320 samples: pitch in octaves above 60 Hz, energy in bels
        relative to the loudest frame, and the slopes of both; scaled to similar deviations.
    """
    compat.apply()
    from torchaudio.functional import compute_deltas

    frames = frame_count(len(wave))
    power = wave.unfold(0, WINDOW, HOP).square().mean(1).double() + 1e-10
    energy = (power / power.max()).log10()
    curves = torch.stack([_pitch(wave, energy, frames), energy])
    both = torch.cat([curves, compute_deltas(curves, win_length=_DELTA_FRAMES)])
    return (both.T / torch.tensor(_SCALE, dtype=torch.float64)).float().contiguous()


def _pitch(wave: Tensor, energy: Tensor, frames: int) -> Tensor:
    """Octaves above the lowest pitch, ``[frame]``; interpolated where the frame is silent.

    Above 200 Hz it is often an octave too low, as autocorrelation cannot tell.
    """
    from torchaudio.functional import detect_pitch_frequency

    hertz = detect_pitch_frequency(
        pad(wave, (0, 30 * HOP))[None],  # it gives fewer frames than the extractor
        sample_rate=16_000,
        frame_time=HOP / 16_000,
        win_length=9,
        freq_low=LOWEST,
        freq_high=HIGHEST,
    )[0, :frames]
    octaves = (hertz.double() / LOWEST).log2().numpy()
    voiced = np.flatnonzero((energy > -_SILENCE_DB / 10).numpy())
    return torch.from_numpy(np.interp(np.arange(frames), voiced, octaves[voiced]))
