"""Distort a waveform: draw what is done to it, then do it.

Every draw follows from (seed, epoch, utterance, role) alone: neither the number of workers, nor the
order of the batches, nor other random numbers change it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...errors import DataError
from ..sampling import generator
from .additive import babble, fit, gaussian, mix
from .convolutive import reject_band, reverberate, shift_pitch, simulate_impulse
from .settings import DistortionSettings
from .sources import AudioPool

logger = logging.getLogger(__name__)


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


class Distorter:
    """Distort waveforms as ``settings`` say (arXiv 2210.07978; see there what is ours).

    The second part comes first, then the noise: a voice in a room, and a noise at the microphone
    (ours). The signal-to-noise ratio is that of the reverberated, shifted or filtered voice.

    Args:
        settings: what is drawn and for whom.
        seed: another seed, other draws.
        root: the folder that ``corpus`` is relative to; for babble.
        corpus: the paths of all utterances; for babble.

    Raises:
        DataError: a folder of noise or impulse responses is missing or holds no audio, or babble
            is asked of a corpus of fewer than two utterances.
    """

    def __init__(
        self,
        settings: DistortionSettings,
        seed: int = 0,
        root: str | Path = ".",
        corpus: Sequence[str] = (),
    ):
        self.settings = settings
        self.seed = seed
        self.noise = [AudioPool.of_folder("distortion.noise", f) for f in settings.noise]
        self.impulses = [AudioPool.of_folder("distortion.impulses", f) for f in settings.impulses]
        self.voices = None
        if settings.babble:
            if len(corpus) < 2:
                raise DataError("distortion.babble: the corpus has no second utterance to mix in")
            self.voices = AudioPool("distortion.babble", root, corpus)
        count = sum(map(len, self.impulses))
        logger.info(
            "distortion %s: %s, %g to %g dB; then one of %s; %s",
            settings.setup,
            ", ".join(self._describe(kind) for kind in settings.additive_kinds),
            settings.snr_min,
            settings.snr_max,
            ", ".join(settings.convolutive_kinds),
            f"{count} impulse responses" if count else "simulated rooms",
        )

    def _describe(self, kind: str) -> str:
        if not kind.startswith("noise:"):
            return kind
        pool = self._noise_pool(kind)
        return f"{pool.root} ({len(pool)} files)"

    def _noise_pool(self, kind: str) -> AudioPool:
        return self.noise[int(kind.removeprefix("noise:"))]

    def generator(self, utterance: str, epoch: int, role: str) -> random.Random:
        """The random numbers of one utterance in one epoch, for one purpose."""
        return generator(self.seed, epoch, utterance, role)

    def plan(self, utterance: str, epoch: int, role: str) -> Plan:
        """What happens to an utterance in an epoch; ``role`` is student, teacher or both."""
        return draw(self.settings, self.generator(utterance, epoch, role))

    def pair(self, wave: Tensor, utterance: str, epoch: int) -> tuple[Tensor, Tensor | None]:
        """What the student hears, and what the teacher hears if it is something else.

        Args:
            wave: ``[sample]`` at 16 kHz, float32; not changed.
            utterance: the path that stands for the utterance.
            epoch: from 0.

        Returns:
            Two waveforms ``[sample]`` as long as ``wave``; the second is None where both are one.

        Raises:
            DataError: a file of noise, an impulse response or an utterance cannot be read.
        """
        setup = self.settings.setup
        if setup == "clean":
            return wave, None
        if setup == "same":
            return self(wave, utterance, epoch, "both"), None
        student = self(wave, utterance, epoch, "student")
        if setup == "setup1":
            return student, wave
        return student, self(wave, utterance, epoch, "teacher")

    def __call__(self, wave: Tensor, utterance: str, epoch: int, role: str) -> Tensor:
        """The waveform ``[sample]`` as its plan has it; see :meth:`pair`."""
        return self.render(wave, self.plan(utterance, epoch, role), utterance)

    def render(self, wave: Tensor, plan: Plan, utterance: str = "") -> Tensor:
        """Carry out ``plan`` on ``wave`` ``[sample]``; ``utterance`` is kept out of the babble.

        A result beyond ±1 is scaled down as a whole until it fits (ours: neither the clipping of a
        converter nor a change of the signal-to-noise ratio).

        Raises:
            DataError: a file that is needed cannot be read.
        """
        distorted = self._add(self._convolve(wave, plan), plan, utterance)
        if distorted is wave:
            return wave
        peak = float(distorted.abs().max())
        return distorted / peak if peak > 1 else distorted

    def _convolve(self, wave: Tensor, plan: Plan) -> Tensor:
        if plan.convolutive == "reverb":
            return self._reverberate(wave, plan)
        if plan.convolutive == "pitch":
            return shift_pitch(wave, plan.cents)
        if plan.convolutive == "band_reject":
            return reject_band(wave, plan.centre, plan.width)
        return wave

    def _reverberate(self, wave: Tensor, plan: Plan) -> Tensor:
        if not self.impulses:
            impulse = simulate_impulse(plan.rt60, plan.drr, plan.convolutive_seed)
            return reverberate(wave, impulse, direct=0)
        rng = random.Random(plan.convolutive_seed)
        # By the number of files, so that each response is as likely, whatever its folder.
        (pool,) = rng.choices(self.impulses, weights=[len(pool) for pool in self.impulses])
        return reverberate(wave, pool.draw(rng))

    def _add(self, wave: Tensor, plan: Plan, utterance: str) -> Tensor:
        if plan.additive == "clean":
            return wave
        rng = random.Random(plan.additive_seed)
        if plan.additive == "gaussian":
            noise = gaussian(len(wave), rng)
        elif plan.additive == "babble" and self.voices is not None:
            noise = babble(self.voices, self.settings.babble_voices, len(wave), rng, utterance)
        else:
            noise = fit(self._noise_pool(plan.additive).draw(rng), len(wave), rng)
        return mix(wave, noise, plan.snr)
