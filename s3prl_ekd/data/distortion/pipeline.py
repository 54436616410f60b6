"""Draw distortions and apply them to waveforms.

Draws depend on (seed, epoch, utterance, role) only: not on the number of workers, the order of the
batches or other random numbers.
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
from ..tables import Utterance
from .additive import babble, crop_or_loop, gaussian, mix_at_snr
from .convolutive import reject_band, reverberate, shift_pitch, simulate_impulse
from .settings import DistortionSettings
from .sources import AudioPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistortionPlan:
    """The drawn distortions of one waveform.

    Values are drawn even if the drawn kinds do not use them, so that turning a kind on or off does
    not change the other values.

    - ``additive``: ``clean``, ``noise:FOLDER_NUMBER``, ``gaussian`` or ``babble``, at ``snr`` dB.
    - ``convolutive``: ``clean``, ``reverb`` (``rt60`` seconds, ``drr`` dB), ``pitch`` (``cents``)
      or ``band_reject`` (``centre`` and ``width`` in Hz).
    - ``additive_seed``, ``convolutive_seed``: seeds for files, crops and noise.
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


def draw(settings: DistortionSettings, rng: random.Random) -> DistortionPlan:
    """Draw one additive and one convolutive kind, and the values of all kinds."""
    octaves = settings.band_high / settings.band_low
    return DistortionPlan(
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
    """Distort waveforms (arXiv 2210.07978; :class:`.DistortionSettings` notes what is ours).

    The convolutive distortion comes first, then the noise, like speech in a room with noise at the
    microphone (ours). The SNR is relative to the reverberated, shifted or filtered speech.

    Args:
        root, corpus: all utterances, with paths relative to ``root``; for babble.

    Raises:
        DataError: a folder of noise or impulse responses is missing or has no audio, or babble is
            on and the corpus has fewer than two utterances.
    """

    def __init__(
        self,
        settings: DistortionSettings,
        seed: int = 0,
        root: str | Path = ".",
        corpus: Sequence[str | Utterance] = (),
    ):
        self.settings = settings
        self.seed = seed
        self.noise = {  # by the additive kind
            f"noise:{i}": AudioPool.of_folder("distortion.noise", folder)
            for i, folder in enumerate(settings.noise)
        }
        self.impulses = [AudioPool.of_folder("distortion.impulses", f) for f in settings.impulses]
        self.voices = None
        if settings.babble:
            if len(corpus) < 2:
                raise DataError("distortion.babble needs a corpus of two utterances or more")
            self.voices = AudioPool("distortion.babble", root, corpus)
        count = sum(map(len, self.impulses))
        logger.info(
            "distortion %s: additive %s, SNR %g to %g dB; convolutive %s, %s",
            settings.setup,
            ", ".join(self._describe(kind) for kind in settings.additive_kinds),
            settings.snr_min,
            settings.snr_max,
            ", ".join(settings.convolutive_kinds),
            f"{count} impulse responses" if count else "simulated rooms",
        )

    def _describe(self, kind: str) -> str:
        pool = self.noise.get(kind)
        return kind if pool is None else f"{pool.root} ({len(pool)} files)"

    def plan(self, utterance: str, epoch: int, role: str) -> DistortionPlan:
        """Draw the distortions of an utterance; ``role`` is student, teacher or both."""
        return draw(self.settings, generator(self.seed, epoch, utterance, role))

    def pair(self, wave: Tensor, utterance: str, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Make the inputs of student and teachers.

        Args:
            wave: ``[sample]`` at 16 kHz, float32; not modified.

        Returns:
            The student's and the teachers' input, each as long as ``wave``; the second is None if
            both are the same.
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
        """Distort ``wave`` by the plan of an utterance and role; see :meth:`pair`."""
        return self.render(wave, self.plan(utterance, epoch, role), utterance)

    def render(self, wave: Tensor, plan: DistortionPlan, utterance: str = "") -> Tensor:
        """Apply ``plan`` to ``wave`` ``[sample]``; babble does not use ``utterance`` itself.

        A result with a peak above 1 is scaled to a peak of 1 (ours), which, unlike clipping, does
        not change the SNR.
        """
        distorted = self._add(self._convolve(wave, plan), plan, utterance)
        if distorted is wave:
            return wave
        peak = float(distorted.abs().max())
        return distorted / peak if peak > 1 else distorted

    def _convolve(self, wave: Tensor, plan: DistortionPlan) -> Tensor:
        if plan.convolutive == "pitch":
            return shift_pitch(wave, plan.cents)
        if plan.convolutive == "band_reject":
            return reject_band(wave, plan.centre, plan.width)
        if plan.convolutive == "clean":
            return wave
        if not self.impulses:
            impulse = simulate_impulse(plan.rt60, plan.drr, plan.convolutive_seed)
            return reverberate(wave, impulse, direct=0)
        rng = random.Random(plan.convolutive_seed)
        # Weighted by the number of files, so that every impulse response is equally likely.
        (pool,) = rng.choices(self.impulses, weights=[len(pool) for pool in self.impulses])
        return reverberate(wave, pool.draw(rng))

    def _add(self, wave: Tensor, plan: DistortionPlan, utterance: str) -> Tensor:
        if plan.additive == "clean":
            return wave
        rng = random.Random(plan.additive_seed)
        if plan.additive == "gaussian":
            noise = gaussian(len(wave), rng)
        elif plan.additive == "babble" and self.voices is not None:
            noise = babble(self.voices, self.settings.babble_voices, len(wave), rng, utterance)
        else:
            noise = crop_or_loop(self.noise[plan.additive].draw(rng), len(wave), rng)
        return mix_at_snr(wave, noise, plan.snr)
