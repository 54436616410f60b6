"""Random choice of utterances, and its command-line options. Does not import torch."""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

from ..data.audio_files import AudioPart, find_audio
from ..data.bad_audio import BadUtterance
from ..data.tables import read_table
from ..errors import ConfigError, DataError
from ..system.seeds import seed_number

logger = logging.getLogger(__name__)


def add_sample_options(parser: argparse.ArgumentParser, utterances: int = 32) -> None:
    """``--data``, ``--audio-root``, ``--utterances``, ``--seed`` and ``--device``."""
    add = parser.add_argument
    add(
        "--data", metavar="TABLE_OR_DIR", type=Path, required=True,
        help="a length table (.csv), or a folder of audio",
    )  # fmt: skip
    add("--audio-root", metavar="ROOT", type=Path, help="root folder of the table's paths")
    add(
        "--utterances", metavar="N", type=int, default=utterances,
        help="number of utterances, chosen at random (default: %(default)s)",
    )  # fmt: skip
    add("--seed", metavar="N", type=seed_number, default=0, help="seed of the choice (default: 0)")
    add("--device", help="device of the models (default: cuda if available)")


def choose_audio(data: Path, audio_root: Path | None, count: int, seed: int = 0) -> list[AudioPart]:
    """Choose up to ``count`` utterances of a folder or length table at random; return them sorted.

    Raises:
        ConfigError: ``count`` is below 1, or ``audio_root`` is missing beside a table or given
            beside a folder.
        DataError: there is no audio, or the table cannot be read.
    """
    if count < 1:
        raise ConfigError(f"--utterances must be at least 1, got {count}")
    if data.is_dir():
        if audio_root is not None:
            raise ConfigError(f"--data {data} is a folder: leave out --audio-root, or give a table")
        parts = {name: AudioPart(data / name) for name in find_audio(data)}
        if not parts:
            raise DataError(f"no audio below {data}")
    else:
        bad: list[BadUtterance] = []
        rows = read_table(data, bad)
        if bad:
            logger.warning("skipped %d rows: %s: %s", len(bad), bad[0].path, bad[0].reason)
        if audio_root is None:
            raise ConfigError(
                f"--data {data} is a table: add --audio-root, the folder its paths are relative to"
            )
        parts = {row.name: row.part(audio_root) for row in rows}
    sample = random.Random(seed).sample(list(parts), min(count, len(parts)))
    return [parts[name] for name in sorted(sample)]
