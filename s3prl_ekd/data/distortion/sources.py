"""Pools of audio files to draw from: noise, impulse responses, utterances for babble."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...errors import DataError
from ..audio import read_audio
from ..audio_files import find_audio
from ..bad_audio import BadAudio
from ..tables import Utterance

logger = logging.getLogger(__name__)

# Mean square below which a waveform counts as silent: -120 dB relative to full scale. The last bit
# of a 16-bit file is about 30 dB louder. An SNR relative to silence is meaningless.
SILENCE = 1e-12


def is_silent(wave: Tensor) -> bool:
    """Whether the variance of ``[sample]`` is at most :data:`SILENCE`, so a constant is silent.

    For a single sample, which may be an impulse response, its square is used.
    """
    wave = wave.double()
    return not float(wave.var(correction=0) if len(wave) > 1 else wave.square().mean()) > SILENCE


class AudioPool:
    """A list of audio files or utterances, which are read when drawn.

    A silent file is skipped when it is drawn, with a warning that counts those skipped in this
    process. Finding silent files in advance would require reading the whole noise corpus.

    Args:
        setting: the setting that defines the pool, for messages.
        root: the folder that the paths are relative to.
        audio: paths, or utterances of a corpus.

    Attributes:
        skip_bad: also skip unusable files; for a corpus, whose bad files are reported elsewhere.
    """

    def __init__(self, setting: str, root: str | Path, audio: Sequence[str | Utterance]):
        if not audio:
            raise DataError(f"{setting}: no audio files below {root}")
        self.setting = setting
        self.root = Path(root)
        self.audio = audio
        self.names = [item if isinstance(item, str) else item.name for item in audio]
        self.skip_bad = False
        self._skipped: set[int] = set()

    @classmethod
    def of_folder(cls, setting: str, folder: str) -> AudioPool:
        """Make a pool of all audio files below ``folder``."""
        try:
            names = find_audio(folder)
        except DataError as error:
            raise DataError(f"{setting}: {error}") from None
        return cls(setting, folder, names)

    def __len__(self) -> int:
        return len(self.audio)

    def draw(self, rng: random.Random, exclude: str | None = None) -> Tensor:
        """Read a file drawn uniformly, or the next one that is neither silent nor ``exclude``.

        ``exclude`` is a path or the name of an utterance.
        """
        start = rng.randrange(len(self.audio))
        for index in itertools.chain(range(start, len(self.audio)), range(start)):
            if index in self._skipped or self.names[index] == exclude:
                continue
            item = self.audio[index]
            part = self.root / item if isinstance(item, str) else item.part(self.root)
            try:
                wave = read_audio(part)
            except BadAudio:
                if not self.skip_bad:
                    raise
                self._skipped.add(index)
                continue
            if not is_silent(wave):
                return wave
            self._skipped.add(index)
            logger.warning(
                "%s: skipping %s, which is silent (%d skipped so far)",
                self.setting,
                part,
                len(self._skipped),
            )
        raise DataError(f"{self.setting}: no usable audio file below {self.root}")
