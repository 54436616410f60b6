"""``run_downstream.py -m evaluate --noise DIR --snr DB``: a test under noise, with s3prl's experts.

The waveforms are changed on their way into the upstream, so that every recipe is served alike and
none is edited. Which noise, and which part of it, follows from a seed and from the utterance's own
samples alone: not from the order or size of the batches, nor from the process, nor from the ratio,
so an utterance has the same noise at 10 and at 0 dB. Prediction files go to a folder of their own,
``EXPDIR/noisy/NAME_snrDB``.
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
from ..data.audio_files import find_audio
from ..data.distortion import additive
from ..data.distortion.pipeline import generator
from ..data.distortion.sources import is_silent
from ..data.manifest import read_manifest
from ..errors import DataError
from ..request import NoisyTest

logger = logging.getLogger(__name__)

KEPT = 100_000_000  # samples of noise kept in memory: 1.7 h, 400 MB


def mix(wave: Tensor, noises: Sequence[Tensor], snr: float, seed: int = 0) -> Tensor:
    """``wave`` with one of ``noises`` at ``snr`` dB; a silent ``wave`` is returned as it is.

    The power is the mean square over the utterance, pauses included. A shorter noise is repeated, a
    longer one cut, from a start that is drawn. The sum is neither clipped nor scaled.

    Args:
        wave: ``[sample]`` at 16 kHz, on any device.
        noises: waveforms ``[sample]`` at 16 kHz; silent ones are passed over.
        snr: dB.
        seed: another seed, other draws.

    Returns:
        ``[sample]``, of the type and on the device of ``wave``.

    Raises:
        DataError: a noise cannot be read, or all are silent.
    """
    plain = wave.detach().float().cpu()
    digest = hashlib.blake2b(plain.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
    rng = generator(seed, epoch=0, utterance=digest, role="test")
    noise = additive.fit(_draw(noises, rng), len(plain), rng)
    return additive.mix(plain, noise, snr).to(wave)


def _draw(noises: Sequence[Tensor], rng: random.Random) -> Tensor:
    first = rng.randrange(len(noises))
    for step in range(len(noises)):
        noise = noises[(first + step) % len(noises)]
        if not is_silent(noise):
            return noise
    raise DataError(f"every one of the {len(noises)} noises is silent")


class NoiseFiles(Sequence):
    """Audio files as waveforms ``[sample]`` at 16 kHz, each read once, when it is first asked for.

    Of very large collections the first :data:`KEPT` samples that were read stay in memory.

    Args:
        root: the folder that ``names`` are relative to.
        names: their paths.
    """

    def __init__(self, root: Path, names: Sequence[str]):
        self.root, self.names = root, names
        self._read: dict[int, Tensor] = {}
        self._kept = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        if index in self._read:
            return self._read[index]
        wave = read_audio(self.root / self.names[index])
        if self._kept + len(wave) <= KEPT:
            self._kept += len(wave)
            self._read[index] = wave
        return wave


def find_noises(path: str | Path) -> NoiseFiles:
    """The noises of a folder of audio, or of the test lines of a manifest (:mod:`..data.manifest`).

    Raises:
        DataError: it is neither, or there is no audio in it.
    """
    path = Path(path)
    if path.is_file():
        names = [entry.path for entry in read_manifest(path) if entry.split == "test"]
        if not names:
            raise DataError(
                f"{path} has no line in the split test, which is what noises to test are"
            )
        return NoiseFiles(path.parent, names)
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder of noises, nor such a manifest (TSV)")
    names = find_audio(path)
    if not names:
        raise DataError(f"{path} has no audio (.flac .wav .ogg .opus) in it")
    return NoiseFiles(path, names)


def noisy(runner: Any, test: NoisyTest) -> Any:
    """s3prl's downstream ``Runner`` with noise on whatever its upstream hears.

    The hook is set once the Runner is built: the second of made-up sound by which s3prl's
    Featurizer counts the layers goes by without it.
    """

    noises = find_noises(test.noise)
    logger.info("test under noise: one of %d noises at %g dB", len(noises), test.snr)

    def add_noise(module, args):
        waves, *others = args
        return [mix(wave, noises, test.snr, test.seed) for wave in waves], *others

    class NoisyRunner(runner):
        def __init__(self, args, config):
            super().__init__(args, config)
            self.upstream.model.register_forward_pre_hook(add_noise)

    return NoisyRunner
