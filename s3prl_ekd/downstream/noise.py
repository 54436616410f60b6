"""``run_downstream.py -m evaluate --noise DIR --snr DB``: evaluation with additive noise.

A hook adds the noise to the upstream's input, so it works for every recipe without changing it.
The noise file and its start depend only on a seed and on the utterance's samples. They do not
depend on the batch, the process or the SNR: an utterance has the same noise at 10 and at 0 dB.
Prediction files go to the folder ``EXPDIR/noisy/NAME_snrDB``.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.audio import read_audio
from ..data.audio_files import SUFFIXES, AudioPart, find_audio
from ..data.distortion import additive
from ..data.distortion.pipeline import generator
from ..data.distortion.sources import is_silent
from ..data.manifest import read_manifest
from ..errors import DataError
from ..request import NoisyTest

logger = logging.getLogger(__name__)

MAX_CACHED_SAMPLES = 100_000_000  # samples of noise kept in memory: 1.7 h, 400 MB


def mix(wave: Tensor, noises: Sequence[Tensor], snr: float, seed: int = 0) -> Tensor:
    """Add one of ``noises`` to ``wave`` at ``snr`` dB; a silent ``wave`` is returned unchanged.

    The power is the mean square over the utterance, pauses included. A shorter noise is repeated, a
    longer one is cropped at a random start. The sum is neither clipped nor scaled.

    Args:
        wave: ``[sample]`` at 16 kHz, on any device.
        noises: waveforms ``[sample]`` at 16 kHz; silent ones are skipped.
        snr: signal-to-noise ratio in dB.
        seed: seed of the choice of noise and start.
    """
    clean = wave.detach().float().cpu()
    digest = hashlib.blake2b(clean.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
    rng = generator(seed, epoch=0, utterance=digest, role="test")
    noise = additive.crop_or_loop(_draw(noises, rng), len(clean), rng)
    return additive.mix_at_snr(clean, noise, snr).to(wave)


def _draw(noises: Sequence[Tensor], rng: random.Random) -> Tensor:
    start = rng.randrange(len(noises))
    for offset in range(len(noises)):
        noise = noises[(start + offset) % len(noises)]
        if not is_silent(noise):
            return noise
    raise DataError(f"all {len(noises)} noises are silent")


class NoiseFiles(Sequence):
    """Audio files in the folder ``root``, or segments of them, as waveforms ``[sample]`` at 16 kHz.

    At most :data:`MAX_CACHED_SAMPLES` samples are kept in memory.

    Attributes:
        names: unique names relative to ``root``.
        parts: the files and segments.
    """

    def __init__(self, root: Path, parts: Sequence[AudioPart]):
        self.names = [str(part) for part in parts]
        self.parts = [part._replace(path=root / part.path) for part in parts]
        self._cache: dict[int, Tensor] = {}
        self._cached_samples = 0

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        if index in self._cache:
            return self._cache[index]
        wave = read_audio(self.parts[index])
        if self._cached_samples + len(wave) <= MAX_CACHED_SAMPLES:
            self._cached_samples += len(wave)
            self._cache[index] = wave
        return wave


def find_noises(path: str | Path) -> NoiseFiles:
    """Find noises in a folder of audio or in the test split of a manifest (TSV)."""
    path = Path(path)
    if path.is_file():
        manifest = read_manifest(path)
        entries = [entry for entry in manifest.entries if entry.split == "test"]
        if not entries:
            raise DataError(f"{path} has no line with split test; --noise uses only these")
        parts = [AudioPart(entry.path, entry.offset, entry.length) for entry in entries]
        return NoiseFiles(manifest.root, parts)
    if not path.is_dir():
        raise DataError(f"no such folder of noises or manifest (TSV): {path}")
    names = find_audio(path)
    if not names:
        raise DataError(f"no audio ({' '.join(SUFFIXES)}) below {path}")
    return NoiseFiles(path, [AudioPart(name) for name in names])


def noisy_runner(runner: Any, test: NoisyTest) -> Any:
    """Subclass s3prl's downstream ``Runner`` so that noise is added to its upstream's input.

    The hook is set after the Runner is built, so no noise is added to the one second of random
    samples from which s3prl's Featurizer counts the layers.
    """
    noises = find_noises(test.noise)
    logger.info("noisy evaluation: one of %d noises at %g dB", len(noises), test.snr)

    def add_noise(module, args):
        waves, *rest = args
        return [mix(wave, noises, test.snr, test.seed) for wave in waves], *rest

    class NoisyRunner(runner):
        def __init__(self, args, config):
            super().__init__(args, config)
            self.upstream.model.register_forward_pre_hook(add_noise)

    return NoisyRunner
