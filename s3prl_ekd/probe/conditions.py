"""Test conditions: clean, or with noise and a simulated room.

Noise, its start and the room depend only on the waveform, so all upstreams hear the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..data.distortion.convolutive import reverberate, simulate_impulse
from ..data.sampling import generator
from ..downstream.noise import mix

_RT60 = (0.2, 0.8)  # seconds, ours: from a small furnished room to a lecture hall
_DRR = (0.0, 10.0)  # dB


@dataclass(frozen=True)
class NoisyCondition:
    """Noise at ``snr`` dB, after a simulated room if ``room``.

    Attributes:
        name: of the condition in tables.
        noises: waveforms ``[sample]`` at 16 kHz.
    """

    name: str
    noises: Sequence[Tensor]
    snr: float
    room: bool

    def __call__(self, wave: Tensor) -> Tensor:
        """Distort a clean waveform ``[sample]``."""
        if self.room:
            digest = hashlib.blake2b(wave.numpy().tobytes(), digest_size=16).hexdigest()
            draws = generator(0, epoch=0, utterance=digest, role="room")
            impulse = simulate_impulse(
                draws.uniform(*_RT60), draws.uniform(*_DRR), draws.getrandbits(32)
            )
            wave = reverberate(wave, impulse, direct=0)
        return mix(wave, self.noises, self.snr)
