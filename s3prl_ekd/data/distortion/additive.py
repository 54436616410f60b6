"""Additive noise, mixed at an exact signal-to-noise ratio (SNR)."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ...compat.torchaudio_functional import functional
from .sources import AudioPool, is_silent


def mix_at_snr(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """Add noise at ``snr`` dB: ``wave + a · noise`` with 10 · log10(P(wave) / P(a · noise)) = snr.

    P is the mean square over the whole utterance, including pauses. A silent waveform is returned
    unchanged, because its SNR is undefined.

    Args:
        wave: ``[sample]``.
        noise: ``[sample]``, as long as ``wave`` and not silent.
    """
    if is_silent(wave):
        return wave
    # In double precision, because sums over a long, quiet waveform are inexact in float32.
    mixed = functional.add_noise(
        wave.double()[None], noise.double()[None], torch.tensor([snr], dtype=torch.float64)
    )
    return mixed[0].float()


def crop_or_loop(noise: Tensor, length: int, rng: random.Random) -> Tensor:
    """Crop or loop ``noise`` to ``length`` samples, from a random start.

    If that crop is silent (e.g. in a recording that starts with zeros), it starts instead at the
    sample that differs most from the silence, or as late as possible.

    Args:
        noise: ``[sample]``; not silent as a whole.
    """
    if len(noise) < length:
        start = rng.randrange(len(noise))
        return noise[(start + torch.arange(length)) % len(noise)]
    last_start = len(noise) - length
    start = rng.randrange(last_start + 1)
    if is_silent(noise[start : start + length]):
        start = min(int((noise - noise[start]).abs().argmax()), last_start)
    return noise[start : start + length]


def gaussian(length: int, rng: random.Random) -> Tensor:
    """Draw white Gaussian noise ``[length]``, float32, with variance 1."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return torch.randn(length, generator=generator)


def babble(pool: AudioPool, voices: int, length: int, rng: random.Random, exclude: str) -> Tensor:
    """Sum ``voices`` utterances of ``pool``, each scaled to mean square 1 over its crop.

    In a small corpus an utterance may be drawn twice, with different starts.

    Args:
        exclude: name of the utterance that the babble is added to.
    """
    total = torch.zeros(length)
    for _ in range(voices):
        voice = crop_or_loop(pool.draw(rng, exclude=exclude), length, rng)
        total += voice / voice.double().square().mean().sqrt().float()
    return total
