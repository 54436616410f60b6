"""Settings of the distortion of waveforms; needs no torch.

Origins of the defaults: *predecessor* (arXiv 2210.07978, of the same first author), *inferred* or
*ours*. The ensemble paper (arXiv 2302.12757) has distortion among its index terms and gives no
details, so distortion is off unless ``setup`` is set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...distill.ranges import check_range

Setup = Literal["clean", "setup1", "setup2", "same"]


@dataclass(frozen=True)
class AdditiveWeights:
    """How often each additive kind is drawn, relative to the others (inferred: equally often).

    Only kinds that are switched on count.
    """

    noise: float = 1.0
    """Each noise folder. Two folders, Gaussian noise and clean are the predecessor's four kinds
    (MUSAN, WHAM!, Gaussian, clean)."""

    gaussian: float = 1.0
    """Gaussian noise."""

    babble: float = 1.0
    """Other utterances of the corpus."""

    clean: float = 1.0
    """Nothing is added."""

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, *vars(self))


@dataclass(frozen=True)
class ConvolutiveWeights:
    """How often each convolutive kind is drawn, relative to the others (inferred: equally often).

    Only kinds that are switched on count.
    """

    reverb: float = 1.0
    """Reverberation."""

    pitch: float = 1.0
    """Pitch shift."""

    band_reject: float = 1.0
    """Band-reject filter."""

    clean: float = 1.0
    """Nothing is changed."""

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, *vars(self))


@dataclass(frozen=True)
class DistortionSettings:
    """Distortion of the input: one additive and one convolutive kind for each waveform."""

    setup: Setup = "clean"
    """Input of student and teachers. ``clean``: nothing is distorted. ``setup1``: a distorted copy
    for the student, clean speech for the teachers; ``setup2``: two independently distorted copies
    (both: predecessor). ``same``: one distorted copy for both (ours)."""

    noise: tuple[str, ...] = ()
    """Folders of noise files; each is an additive kind."""

    gaussian: bool = True
    """White noise as an additive kind (predecessor)."""

    babble: bool = False
    """Other utterances of the corpus as an additive kind (ours)."""

    babble_voices: int = 4
    """Utterances mixed into babble, equally loud (ours)."""

    snr_min: float = 10.0
    """Lowest signal-to-noise ratio in dB; drawn uniformly (predecessor)."""

    snr_max: float = 19.0
    """Highest signal-to-noise ratio in dB (predecessor)."""

    additive_weights: AdditiveWeights = field(default_factory=AdditiveWeights)
    """How often each additive kind is drawn."""

    impulses: tuple[str, ...] = ()
    """Folders of room impulse responses; without one, a room is simulated by decaying noise
    (ours)."""

    rt60_min: float = 0.2
    """Shortest reverberation time of a simulated room, in seconds (ours)."""

    rt60_max: float = 0.8
    """Longest reverberation time of a simulated room, in seconds (ours)."""

    drr_min: float = 0.0
    """Lowest ratio of direct path to reverberation in a simulated room, in dB (ours)."""

    drr_max: float = 10.0
    """Highest ratio of direct path to reverberation in a simulated room, in dB (ours)."""

    pitch_cents: float = 500.0
    """Largest pitch shift up or down in cents, drawn uniformly (predecessor: 500; uniform is
    inferred); 0 switches the kind off."""

    band_low: float = 200.0
    """Lowest centre of the band-reject filter in Hz, drawn uniformly in octaves (ours; the
    predecessor names the kind only)."""

    band_high: float = 6000.0
    """Highest centre of the band-reject filter in Hz (ours)."""

    band_width_min: float = 100.0
    """Smallest width of the band-reject filter in Hz, drawn uniformly (ours)."""

    band_width_max: float = 1000.0
    """Largest width of the band-reject filter in Hz (ours)."""

    convolutive_weights: ConvolutiveWeights = field(default_factory=ConvolutiveWeights)
    """How often each convolutive kind is drawn."""

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
                    f"{low} ({getattr(self, low)}) must not be above {high} ({getattr(self, high)})"
                )
        check_range(self, -60, 100, "snr_min", "snr_max", "drr_min", "drr_max")
        check_range(self, 0.01, 10, "rt60_min", "rt60_max")
        check_range(self, 1, 64, "babble_voices")
        # 8000 Hz is the Nyquist frequency. A filter below 20 Hz rings longer than a word lasts.
        check_range(self, 20, 7900, "band_low", "band_high")
        check_range(self, 20, 4000, "band_width_min", "band_width_max")
        if self.pitch_cents != 0:
            check_range(self, 20, 2400, "pitch_cents")
        for part, kinds in (
            ("additive_weights", self.additive_kinds),
            ("convolutive_weights", self.convolutive_kinds),
        ):
            if not sum(kinds.values()) > 0:
                raise ValueError(f"{part}: at least one kind needs a weight above 0")

    @property
    def additive_kinds(self) -> dict[str, float]:
        """Weight of each additive kind switched on; ``noise:0`` is the first noise folder."""
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
        """Weight of each convolutive kind that is switched on."""
        weights = self.convolutive_weights
        kinds = {"clean": weights.clean, "reverb": weights.reverb}
        if self.pitch_cents:
            kinds["pitch"] = weights.pitch
        kinds["band_reject"] = weights.band_reject
        return kinds
