"""Which utterances a command samples: its options, and a random choice. Loads no torch."""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

from ..data.audio_files import find_audio
from ..data.bad_audio import Bad
from ..data.tables import read_table
from ..errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def add_sample_options(parser: argparse.ArgumentParser, utterances: int = 32) -> None:
    """``--data``, ``--audio-root``, ``--utterances``, ``--seed`` and ``--device``."""
    parser.add_argument(
        "--data",
        metavar="TABLE_OR_DIR",
        type=Path,
        required=True,
        help="a length table (.csv), or a folder with audio below it",
    )
    parser.add_argument(
        "--audio-root", metavar="ROOT", type=Path, help="folder that the table's paths start from"
    )
    parser.add_argument(
        "--utterances",
        metavar="N",
        type=int,
        default=utterances,
        help="how many to listen to, chosen at random (default: %(default)s)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", help="default: cuda where there is one")


def choose_audio(data: Path, audio_root: Path | None, count: int, seed: int = 0) -> list[Path]:
    """A random choice of ``count`` utterances (all, where there are fewer), in a fixed order.

    Args:
        data: a length table, whose paths start from ``audio_root``, or a folder of audio.

    Raises:
        ConfigError: ``count`` is below 1, or ``audio_root`` is missing.
        DataError: there is no audio, or the table cannot be read.
    """
    if count < 1:
        raise ConfigError(f"--utterances is {count}; 1 or more is allowed")
    if data.is_dir():
        root, names = data, find_audio(data)
        if not names:
            raise DataError(f"there is no audio below {data}")
    else:
        bad: list[Bad] = []
        names = [row.path for row in read_table(data, bad)]
        if bad:
            logger.warning("left out %d: %s: %s", len(bad), bad[0].path, bad[0].reason)
        if audio_root is None:
            raise ConfigError(
                "--data is a table, so --audio-root is needed: the folder its paths start from"
            )
        root = audio_root
    chosen = random.Random(seed).sample(names, min(count, len(names)))
    return [root / name for name in sorted(chosen)]
