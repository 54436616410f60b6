"""Utterance mixing (WavLM, arXiv 2110.13900, section 3.3).

Another speaker or noise is added to a part of an excerpt; the labels remain those of the excerpt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

SPEECH_DB = (-5.0, 5.0)  # of the first speaker over the second
NOISE_DB = (-5.0, 20.0)  # of the speaker over the noise


def mix_over(
    wave: Tensor, other: Tensor, decibel: float, at: int, start: int, count: int
) -> Tensor:
    """Return ``wave`` with ``other[start:start + count]`` added at sample ``at``.

    Args:
        wave: ``[sample]``; not changed.
        other: ``[sample]``.
        decibel: mean power of ``wave`` over that of ``other`` after scaling, both in full length.
        at, start, count: samples.
    """
    power, second = (float(w.double().square().mean()) for w in (wave, other))
    mixed = wave.clone()
    if second > 0:
        scale = (power / (10 ** (decibel / 10) * second)) ** 0.5
        mixed[at : at + count] += scale * other[start : start + count]
    return mixed


def mix_batch(
    waves: Tensor,
    generators: Sequence[random.Random],
    noises: Sequence[Tensor],
    mix: float,
    mix_noise: float,
) -> Tensor:
    """Add other excerpts of the batch, or noise, to some excerpts.

    Args:
        waves: ``[batch, sample]``, clean; not changed. The added speakers are clean, too.
        generators: one for each excerpt.
        noises: noise clips, ``[sample]`` each.
        mix: probability that an excerpt is mixed.
        mix_noise: probability that noise is added to such an excerpt, else speech. A batch of one
            excerpt gets noise only.
    """
    length = waves.shape[1]
    mixed = []
    for index, (wave, rng) in enumerate(zip(waves, generators, strict=True)):
        if rng.random() >= mix:
            mixed.append(wave)
            continue
        if rng.random() < mix_noise or len(waves) == 1:
            other, decibel = noises[rng.randrange(len(noises))], rng.uniform(*NOISE_DB)
        else:
            second = rng.randrange(len(waves) - 1)
            other, decibel = waves[second + (second >= index)], rng.uniform(*SPEECH_DB)
        count = min(rng.randint(1, max(1, length // 2)), len(other))  # at most half of the excerpt
        at, start = rng.randint(0, length - count), rng.randint(0, len(other) - count)
        mixed.append(mix_over(wave, other, decibel, at, start, count))
    return torch.stack(mixed)
