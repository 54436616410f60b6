"""Synthetic noise clips: white, pink, brown, mains hum, and babble."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .voices import SAMPLE_RATE

LOUDNESS = 0.06  # root mean square, as of the speech, so only the mixer sets the SNR


def make_noises(
    rng: np.random.Generator, speech: Sequence[np.ndarray], seconds: float
) -> dict[str, np.ndarray]:
    """Make clips by name, float64 [samples] at 16 kHz, all of the same loudness.

    Args:
        speech: one or more float waveforms [samples] for the babble.
    """
    samples = round(seconds * SAMPLE_RATE)
    clips = {
        "white": rng.standard_normal(samples),
        "pink": _coloured(rng, samples, exponent=1.0),
        "brown": _coloured(rng, samples, exponent=2.0),
        "hum-50": _hum(rng, samples, 50.0),
        "hum-60": _hum(rng, samples, 60.0),
        "babble-few": _babble(rng, speech, samples, talkers=4),
        "babble-many": _babble(rng, speech, samples, talkers=12),
    }
    return {name: clip * (LOUDNESS / np.sqrt(np.mean(clip**2))) for name, clip in clips.items()}


def _coloured(rng: np.random.Generator, samples: int, exponent: float) -> np.ndarray:
    """Noise with a power spectrum of 1 / frequency ** ``exponent``, flat below 20 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum *= np.maximum(frequencies, 20.0) ** (-exponent / 2)
    return np.fft.irfft(spectrum, samples)


def _hum(rng: np.random.Generator, samples: int, mains: float) -> np.ndarray:
    """Mains hum: harmonics of ``mains`` Hz, slowly modulated, with weak white noise."""
    time = np.arange(samples) / SAMPLE_RATE
    wave = 0.02 * rng.standard_normal(samples)
    for harmonic in range(1, 13):
        phase, modulation = rng.uniform(0, 2 * np.pi, size=2)
        strength = (1 + 0.3 * np.sin(2 * np.pi * 0.2 * time + modulation)) / harmonic
        wave += strength * np.sin(2 * np.pi * mains * harmonic * time + phase)
    return wave


def _babble(
    rng: np.random.Generator, speech: Sequence[np.ndarray], samples: int, talkers: int
) -> np.ndarray:
    """The sum of ``talkers`` streams of utterances without pauses, at random offsets and levels."""
    total = np.zeros(samples)
    for _ in range(talkers):
        stream = np.zeros(0)
        while len(stream) < 2 * samples:
            stream = np.concatenate([stream, speech[int(rng.integers(len(speech)))]])
        start = int(rng.integers(samples))
        total += rng.uniform(0.5, 1.0) * stream[start : start + samples]
    return total
