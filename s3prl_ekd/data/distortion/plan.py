"""What is drawn for one waveform, before anything is read or computed.

Every choice follows from (seed, epoch, utterance, role) alone: neither the number of workers, nor
the order of the batches, nor what else drew random numbers plays a part.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from .settings import DistortionSettings


@dataclass(frozen=True)
class Plan:
    """The distortions of one waveform. A value that its kind does not use is drawn all the same,
    so that turning a kind on or off does not change the other values.

    ``additive``: ``clean``, ``noise:FOLDER_NUMBER``, ``gaussian`` or ``babble``, at ``snr`` dB.
    ``convolutive``: ``clean``, ``reverb``, ``pitch`` or ``band_reject``, with ``rt60`` seconds,
    ``drr`` dB, ``cents``, ``centre`` and ``width`` Hz. The two seeds choose files, crops and noise.
    """

    additive: str
    snr: float
    additive_seed: int
    convolutive: str
    rt60: float
    drr: float
    cents: float
    centre: float
    width: float
    convolutive_seed: int


def generator(seed: int, epoch: int, utterance: str, role: str) -> random.Random:
    """A source of random numbers of its own for these four.

    Python's ``hash`` of a text changes from process to process; a digest does not.
    """
    # The one part that may hold a newline comes last, so no two quadruples give the same text.
    text = f"{seed}\n{epoch}\n{role}\n{utterance}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def draw(settings: DistortionSettings, rng: random.Random) -> Plan:
    """Draw one additive kind, one of the second part, and a value for each of their settings."""
    octaves = settings.band_high / settings.band_low
    return Plan(
        additive=_pick(rng, settings.additive_kinds),
        snr=rng.uniform(settings.snr_min, settings.snr_max),
        additive_seed=rng.getrandbits(63),
        convolutive=_pick(rng, settings.convolutive_kinds),
        rt60=rng.uniform(settings.rt60_min, settings.rt60_max),
        drr=rng.uniform(settings.drr_min, settings.drr_max),
        cents=rng.uniform(-settings.pitch_cents, settings.pitch_cents),
        centre=settings.band_low * octaves ** rng.random(),
        width=rng.uniform(settings.band_width_min, settings.band_width_max),
        convolutive_seed=rng.getrandbits(63),
    )


def _pick(rng: random.Random, kinds: dict[str, float]) -> str:
    return rng.choices(list(kinds), weights=list(kinds.values()))[0]
