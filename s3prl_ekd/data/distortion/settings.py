"""What may be done to a waveform before student and teacher hear it; no torch is needed here.

Each default says where it comes from: *predecessor* (arXiv 2210.07978, of the same first author),
*inferred* or *ours*. The ensemble paper itself (arXiv 2302.12757) names distortions among its
index terms and says no more, so all of this is off unless ``setup`` is set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Setup = Literal["clean", "setup1", "setup2", "same"]


@dataclass(frozen=True)
class AdditiveWeights:
    """How often each additive kind is drawn, relative to the others (inferred: all alike).

    ``noise`` is the weight of each noise folder: two folders, Gaussian noise and clean are the
    predecessor's four kinds (MUSAN, WHAM!, Gaussian, clean). A kind that is off does not count.
    """

    noise: float = 1.0
    gaussian: float = 1.0
    babble: float = 1.0
    clean: float = 1.0

    def __post_init__(self) -> None:
        _no_negative(self)


@dataclass(frozen=True)
class ConvolutiveWeights:
    """How often each kind of the second part is drawn, relative to the others (inferred: alike)."""

    reverb: float = 1.0
    pitch: float = 1.0
    band_reject: float = 1.0
    clean: float = 1.0

    def __post_init__(self) -> None:
        _no_negative(self)


@dataclass(frozen=True)
class DistortionSettings:
    """Who hears what, and what is drawn: one additive kind and one of the second part a waveform.

    ``setup``: ``clean`` distorts nothing (default). ``setup1`` gives the student a distorted copy
    and the teacher the clean one; ``setup2`` gives each its own, drawn independently (both
    predecessor); ``same`` gives both one distorted copy (ours).

    Additive part:

    - ``noise``: folders of noise files, each a kind of its own.
    - ``gaussian``: white noise (predecessor).
    - ``babble``: ``babble_voices`` other utterances of the corpus, equally loud (ours).
    - ``snr_min``, ``snr_max``: bounds in dB of the signal-to-noise ratio, uniform (predecessor).

    Second part:

    - ``impulses``: folders of impulse responses. Without one, a room is simulated: decaying noise
      with a reverberation time between ``rt60_min`` and ``rt60_max`` seconds and a direct path
      ``drr_min`` to ``drr_max`` dB above the rest (ours).
    - ``pitch_cents``: largest shift up or down, uniform (predecessor: 500; uniform is inferred); 0
      leaves the kind out.
    - band reject: a centre between ``band_low`` and ``band_high`` Hz, uniform in octaves, and a
      width between ``band_width_min`` and ``band_width_max`` Hz, uniform (ours; the predecessor
      names the kind only).
    """

    setup: Setup = "clean"
    noise: tuple[str, ...] = ()
    gaussian: bool = True
    babble: bool = False
    babble_voices: int = 4
    snr_min: float = 10.0
    snr_max: float = 19.0
    additive_weights: AdditiveWeights = field(default_factory=AdditiveWeights)
    impulses: tuple[str, ...] = ()
    rt60_min: float = 0.2
    rt60_max: float = 0.8
    drr_min: float = 0.0
    drr_max: float = 10.0
    pitch_cents: float = 500.0
    band_low: float = 200.0
    band_high: float = 6000.0
    band_width_min: float = 100.0
    band_width_max: float = 1000.0
    convolutive_weights: ConvolutiveWeights = field(default_factory=ConvolutiveWeights)

    def __post_init__(self) -> None:
        for low, high in (
            ("snr_min", "snr_max"),
            ("rt60_min", "rt60_max"),
            ("drr_min", "drr_max"),
            ("band_low", "band_high"),
            ("band_width_min", "band_width_max"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} ({getattr(self, low)}) is above {high} ({getattr(self, high)})"
                )
        _between(self, "snr_min", -60, 100)
        _between(self, "snr_max", -60, 100)
        _between(self, "drr_min", -60, 100)
        _between(self, "drr_max", -60, 100)
        _between(self, "rt60_min", 0.01, 10)
        _between(self, "rt60_max", 0.01, 10)
        _between(self, "babble_voices", 1, 64)
        # 16 kHz ends at 8000 Hz. Narrower than 20 Hz, a filter rings longer than a word lasts.
        _between(self, "band_low", 20, 7900)
        _between(self, "band_high", 20, 7900)
        _between(self, "band_width_min", 20, 4000)
        _between(self, "band_width_max", 20, 4000)
        if self.pitch_cents != 0:
            _between(self, "pitch_cents", 20, 2400)
        for part, kinds in (
            ("additive_weights", self.additive_kinds),
            ("convolutive_weights", self.convolutive_kinds),
        ):
            if not sum(kinds.values()) > 0:
                raise ValueError(f"{part}: no kind that is on has a weight above 0")

    @property
    def additive_kinds(self) -> dict[str, float]:
        """Weight of each additive kind that is on; ``noise:0`` is the first noise folder."""
        weights = self.additive_weights
        kinds = {"clean": weights.clean}
        kinds.update({f"noise:{i}": weights.noise for i in range(len(self.noise))})
        if self.gaussian:
            kinds["gaussian"] = weights.gaussian
        if self.babble:
            kinds["babble"] = weights.babble
        return kinds

    @property
    def convolutive_kinds(self) -> dict[str, float]:
        """Weight of each kind of the second part that is on."""
        weights = self.convolutive_weights
        kinds = {"clean": weights.clean, "reverb": weights.reverb}
        if self.pitch_cents:
            kinds["pitch"] = weights.pitch
        kinds["band_reject"] = weights.band_reject
        return kinds


def _no_negative(weights: object) -> None:
    for name, value in vars(weights).items():
        if value < 0:
            raise ValueError(f"{name} is {value}; a weight of 0 or more is allowed")


def _between(settings: object, name: str, low: float, high: float) -> None:
    if not low <= getattr(settings, name) <= high:
        raise ValueError(f"{name} is {getattr(settings, name)}; {low} to {high} is allowed")
