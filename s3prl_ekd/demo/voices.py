"""Synthetic speakers: distinct voices, and :func:`speak`, which gives 16 kHz samples.

A speaker is a voice file of our own for espeak-ng: an accent, a glottal source of its Klatt
synthesiser, a pitch range, formants scaled as vocal tracts of different lengths scale them, and a
speaking rate. They are no people, but they differ in what makes people differ for a model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .espeak import espeak

SAMPLE_RATE = 16_000  # Hz
_LOUDNESS = 0.06  # root mean square of every utterance; the sources differ by a factor of six

# How espeak-ng says English in one place or another: its phoneme table, and which of the
# conditional rules of its English dictionary hold. A voice file must name both; its `language`
# alone would always be British, and a name that espeak-ng lacks is no error to it.
ACCENTS = {
    "american": "phonemes en-us\ndictrules 3 6\n",
    "british": "phonemes en-rp\n",
    "scottish": "phonemes en-sc\ndictrules 2 5 6 7\n",
    "caribbean": "phonemes en-wi\ndictrules 8\n",
}
_ACCENT_OF_SPEAKER = ("american", "british", "american", "scottish", "american", "caribbean")
# Glottal sources of the Klatt synthesiser. Five of its six: with a cycle of another length than
# that of the accents, speakers of one accent have different sources.
_SOURCES = (1, 2, 4, 5, 6)


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker."""

    accent: str  # one of ACCENTS
    female: bool
    source: int  # Klatt source, 1 to 6
    pitch: tuple[int, int]  # Hz, lowest and highest of the intonation
    formants: tuple[int, ...]  # frequency in percent of the accent's own, formants 0 to 5
    widths: tuple[int, ...]  # bandwidth in percent, formants 0 to 5
    consonants: int  # strength of the consonants in percent
    rate: int  # words a minute

    def file(self) -> str:
        """The contents of the voice file; why flutter is off: see :mod:`.espeak`."""
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
    """``count`` voices, female and male in turn, spread over the ranges of their sex.

    The first voices are the same whatever ``count`` is, so a corpus can grow by speakers.
    """
    rng = random.Random(f"voices {seed}")
    voices = []
    for number in range(count):
        female = number % 2 == 0
        # A golden-ratio sequence fills a range evenly at any length; drawing would cluster.
        place = (0.5 + (number // 2) * 0.618034) % 1
        low = round(145 + 55 * place) if female else round(72 + 43 * place)
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
    """Say ``text``; the same arguments give the same samples, in any order and any process.

    Args:
        text: an English sentence.
        voice: who says it.
        rate: factor on the voice's speaking rate.
        pitch: 0 to 100; 50 is the voice's own.

    Returns:
        16 kHz mono samples of 16 bit, [samples].

    Raises:
        SetupError: espeak-ng is not installed.
        DataError: ``text`` is empty.
    """
    if not text.strip():
        raise DataError("there is nothing to say in an empty text")
    engine = espeak()
    samples = engine.synthesise(text, voice.file(), rate=round(voice.rate * rate), pitch=pitch)
    wave = _resample(samples.astype(np.float64) / 32768, engine.rate)
    return to_int16(wave * (_LOUDNESS / np.sqrt(np.mean(wave**2))))


def to_int16(wave: np.ndarray, peak: float = 0.95) -> np.ndarray:
    """Samples of 16 bit from ``wave`` in [-1, 1], made softer where it exceeds ``peak``."""
    loudest = np.abs(wave).max()
    if loudest > peak:
        wave = wave * (peak / loudest)
    return np.round(wave * 32767).astype(np.int16)


def _resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """From ``rate`` Hz to 16 kHz, float64 [samples] in and out."""
    if rate == SAMPLE_RATE:
        return wave
    from ..compat import apply

    apply()  # torchaudio does not import everywhere without it
    import torch
    from torchaudio.functional import resample

    # float64, so that rounding to 16 bit hides how the sums were ordered (number of threads).
    return resample(torch.from_numpy(wave), rate, SAMPLE_RATE).numpy()
