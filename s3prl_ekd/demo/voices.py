"""Synthetic speakers for espeak-ng, and :func:`speak`, which synthesises 16 kHz speech.

A speaker is a voice file with an accent, a glottal source of the Klatt synthesiser, a pitch range,
formants scaled as by vocal tract length, and a speaking rate. Real speakers differ in the same
properties, so a model can learn to distinguish these.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .espeak import espeak

SAMPLE_RATE = 16_000  # Hz
_LOUDNESS = 0.06  # root mean square of every utterance; unscaled, sources differ by a factor of 6

# English accents of espeak-ng: a phoneme table, and the conditional rules of its English dictionary
# that apply. A voice file must name both: `language` alone is always British, and espeak-ng ignores
# unknown names without an error.
ACCENTS = {
    "american": "phonemes en-us\ndictrules 3 6\n",
    "british": "phonemes en-rp\n",
    "scottish": "phonemes en-sc\ndictrules 2 5 6 7\n",
    "caribbean": "phonemes en-wi\ndictrules 8\n",
}
_ACCENT_OF_SPEAKER = ("american", "british", "american", "scottish", "american", "caribbean")
# Glottal sources of the Klatt synthesiser: five of its six. Accents and sources have cycles of
# different lengths, so speakers of one accent have different sources.
_SOURCES = (1, 2, 4, 5, 6)


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker."""

    accent: str  # one of ACCENTS
    female: bool
    source: int  # Klatt source, 1 to 6
    pitch: tuple[int, int]  # Hz, lowest and highest of the intonation
    formants: tuple[int, ...]  # frequency in percent of the accent's, formants 0 to 5
    widths: tuple[int, ...]  # bandwidth in percent, formants 0 to 5
    consonants: int  # strength of the consonants in percent
    rate: int  # words per minute

    def file(self) -> str:
        """Contents of the voice file. Flutter is off for reproducibility, see :mod:`.espeak`."""
        formants = "".join(
            f"formant {number} {frequency} 100 {width}\n"
            for number, (frequency, width) in enumerate(
                zip(self.formants, self.widths, strict=True)
            )
        )
        gender = "female" if self.female else "male"
        return (
            f"name ekd\nlanguage en\n{ACCENTS[self.accent]}gender {gender}\n"
            f"flutter 0\nklatt {self.source}\npitch {self.pitch[0]} {self.pitch[1]}\n"
            f"consonants {self.consonants} {self.consonants}\n{formants}"
        )


def make_voices(count: int, seed: int = 1337) -> list[Voice]:
    """Make ``count`` voices, alternately female and male, with pitch spread over the sex's range.

    The first voices do not depend on ``count``, so speakers can be added to a corpus.
    """
    rng = random.Random(f"voices {seed}")
    voices = []
    for number in range(count):
        female = number % 2 == 0
        # A golden-ratio sequence covers a range evenly at any length; random draws cluster.
        fraction = (0.5 + (number // 2) * 0.618034) % 1
        low = round(145 + 55 * fraction) if female else round(72 + 43 * fraction)
        tract = (108 + 14 * rng.random()) if female else (90 + 14 * rng.random())
        voices.append(
            Voice(
                accent=_ACCENT_OF_SPEAKER[number % len(_ACCENT_OF_SPEAKER)],
                female=female,
                source=_SOURCES[number % len(_SOURCES)],
                pitch=(low, round(low * rng.uniform(1.35, 1.7))),
                formants=tuple(round(tract * rng.uniform(0.97, 1.03)) for _ in range(6)),
                widths=tuple(rng.randint(90, 140) for _ in range(6)),
                consonants=rng.randint(90, 125),
                rate=rng.randint(135, 190),
            )
        )
    return voices


def speak(text: str, voice: Voice, *, rate: float = 1.0, pitch: int = 50) -> np.ndarray:
    """Synthesise an English sentence; deterministic, also across calls and processes.

    Args:
        rate: factor of the voice's speaking rate.
        pitch: 0 to 100; 50 is the voice's default.

    Returns:
        16-bit mono samples at 16 kHz, [samples].
    """
    if not text.strip():
        raise DataError("cannot synthesise an empty text")
    import torch

    from ..data.audio import resample

    engine = espeak()
    samples = engine.synthesise(text, voice.file(), rate=round(voice.rate * rate), pitch=pitch)
    # In float64, rounding to 16 bit hides the order of the sums, which depends on threads.
    wave = resample(torch.from_numpy(samples.astype(np.float64) / 32768), engine.rate).numpy()
    return to_int16(wave * (_LOUDNESS / np.sqrt(np.mean(wave**2))))


def to_int16(wave: np.ndarray, peak: float = 0.95) -> np.ndarray:
    """Convert ``wave`` in [-1, 1] to 16 bit; scale it down if it exceeds ``peak``."""
    loudest = np.abs(wave).max()
    if loudest > peak:
        wave = wave * (peak / loudest)
    return np.round(wave * 32767).astype(np.int16)
