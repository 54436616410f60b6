"""Noise on a waveform: cut to its length, and mixed at an exact signal-to-noise ratio."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ...compat.torchaudio_functional import functional
from .sources import AudioPool, is_silent


def mix(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """``wave + a · noise``, with a such that 10 · log10(P(wave) / P(a · noise)) is ``snr``.

    P is the mean square over the whole utterance, pauses included. A silent waveform is returned
    as it is: it has no signal-to-noise ratio.

    Args:
        wave: ``[sample]``.
        noise: ``[sample]``, as long as ``wave`` and not silent.
        snr: dB.
    """
    if is_silent(wave):
        return wave
    # In double precision: the energies of a quiet minute of samples lie below float32's range.
    mixed = functional.add_noise(
        wave.double()[None], noise.double()[None], torch.tensor([snr], dtype=torch.float64)
    )
    return mixed[0].float()


def fit(noise: Tensor, length: int, rng: random.Random) -> Tensor:
    """``length`` samples of ``noise`` from a random start: a crop of a longer one, a loop of a
    shorter one.

    Where the crop would be silent (a recording that begins with zeros), it starts at the loudest
    sample instead, or as late as it can.

    Args:
        noise: ``[sample]``, not silent as a whole.
        length: samples.
        rng: draws the start.
    """
    if len(noise) < length:
        start = rng.randrange(len(noise))
        return noise[(start + torch.arange(length)) % len(noise)]
    last = len(noise) - length
    start = rng.randrange(last + 1)
    if is_silent(noise[start : start + length]):
        start = min(int((noise - noise[start]).abs().argmax()), last)
    return noise[start : start + length]


def gaussian(length: int, rng: random.Random) -> Tensor:
    """White Gaussian noise ``[length]``, float32, of variance 1."""
    source = torch.Generator().manual_seed(rng.getrandbits(63))
    return torch.randn(length, generator=source)


def babble(pool: AudioPool, voices: int, length: int, rng: random.Random, own: str) -> Tensor:
    """The sum ``[length]`` of ``voices`` utterances of ``pool`` other than ``own``, each of mean
    square 1 over its crop. In a small corpus the same one may come twice, at another start.

    Raises:
        DataError: an utterance cannot be read, or there is no other one.
    """
    total = torch.zeros(length)
    for _ in range(voices):
        voice = fit(pool.draw(rng, other_than=own), length, rng)
        total += voice / voice.double().square().mean().sqrt().float()
    return total
