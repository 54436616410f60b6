"""The sound of a benchmark: FLAC files of at most so many seconds, and their length table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from ..data.audio import read_audio
from ..data.audio_files import find_audio
from ..data.lengths import write_table
from ..errors import DataError

RATE = 16_000  # Hz
SET = "bench"


def write_corpus(folder: Path, count: int, seconds: float, source: Path | None) -> None:
    """Write ``audio/*.flac`` and ``tables/bench.csv`` into a folder.

    Args:
        folder: an empty one.
        count: utterances.
        seconds: the longest; made-up ones have between half of it and all of it.
        source: a folder of audio of which the first files, by name, are taken, cut to ``seconds``;
            None: noise.

    Raises:
        DataError: the source has too few files, or one that cannot be read.
    """
    (folder / "audio").mkdir()
    (folder / "tables").mkdir()
    rows = []
    waves = _made_up(count, seconds) if source is None else _taken(source, count, seconds)
    for number, wave in enumerate(waves):
        name = f"u{number:04d}.flac"
        soundfile.write(folder / "audio" / name, wave, RATE, subtype="PCM_16")
        rows.append((name, len(wave)))
    write_table(folder / "tables" / f"{SET}.csv", rows)


def _made_up(count: int, seconds: float):
    draws = np.random.default_rng(0)
    for length in draws.uniform(0.5, 1.0, count) * seconds * RATE:
        yield 0.1 * draws.standard_normal(int(length)).clip(-4, 4)


def _taken(source: Path, count: int, seconds: float):
    names = find_audio(source)[:count]
    if len(names) < count:
        raise DataError(
            f"{source} has {len(names)} audio files and the benchmark wants {count}, a batch for "
            "each turn; lower --batch or --turns"
        )
    for name in names:
        yield read_audio(source / name)[: int(seconds * RATE)].numpy()
