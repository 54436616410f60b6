"""Audio files to draw from: noise, impulse responses, other utterances."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...errors import DataError
from ..audio import read_audio
from ..audio_files import find_audio
from ..bad_audio import BadAudio

logger = logging.getLogger(__name__)

# Mean square below which a waveform counts as silent: -120 dB of full scale. The last bit of a
# 16-bit file is some 30 dB louder; an SNR against less than this has no meaning.
SILENCE = 1e-12


def is_silent(wave: Tensor) -> bool:
    """Whether the mean square of ``[sample]`` about its mean is below :data:`SILENCE`: a constant
    is no sound. Of a single sample, which may be an impulse response, the square itself."""
    wave = wave.double()
    return not float(wave.var(correction=0) if len(wave) > 1 else wave.square().mean()) > SILENCE


class AudioPool:
    """A list of audio files, found once and read when drawn.

    Silent files are passed over when they are met (to look for them first would mean to read all
    of a noise corpus), with a warning that counts those met in this process.

    Attributes:
        skip_bad: pass over files that cannot be used, too: for a corpus whose bad files are listed.

    Args:
        what: the setting that names the pool, for messages.
        root: the folder that ``names`` are relative to.
        names: paths of the files.

    Raises:
        DataError: ``names`` is empty.
    """

    def __init__(self, what: str, root: str | Path, names: Sequence[str]):
        if not names:
            raise DataError(f"{what}: there is no audio file in {root}")
        self.what = what
        self.root = Path(root)
        self.names = names
        self.skip_bad = False
        self._silent: set[int] = set()

    @classmethod
    def of_folder(cls, what: str, folder: str) -> AudioPool:
        """Every audio file below ``folder``.

        Raises:
            DataError: it is not a folder, cannot be listed or holds no audio.
        """
        try:
            names = find_audio(folder)
        except DataError as error:
            raise DataError(f"{what}: {error}") from None
        return cls(what, folder, names)

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, rng: random.Random, other_than: str | None = None) -> Tensor:
        """The waveform ``[sample]`` of a file drawn uniformly, or of the next one that is neither
        silent nor ``other_than``.

        Raises:
            DataError: the file cannot be read, or no other one is left.
        """
        first = rng.randrange(len(self.names))
        for step in range(len(self.names)):
            index = (first + step) % len(self.names)
            if index in self._silent or self.names[index] == other_than:
                continue
            try:
                wave = read_audio(self.root / self.names[index])
            except BadAudio:
                if not self.skip_bad:
                    raise
                self._silent.add(index)
                continue
            if not is_silent(wave):
                return wave
            self._silent.add(index)
            logger.warning(
                "%s: %s is silent and passed over (%d so far)",
                self.what,
                self.root / self.names[index],
                len(self._silent),
            )
        raise DataError(f"{self.what}: every audio file in {self.root} to draw from is silent")
