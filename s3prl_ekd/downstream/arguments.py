"""``--cache-features DIR``: taken out of the arguments before s3prl's script sees them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SetupError

OPTION, LIMIT = "--cache-features", "--cache-features-gb"
LIMIT_GB = 50.0
HELP = """\
Ours too: a frozen upstream's hidden states, computed once for each waveform (each utterance alone)
  --cache-features DIR     keep them there, for other epochs, evaluations, seeds and tasks
  --cache-features-gb N    write no more once DIR has so many GB (default: 50)
  float16; layers x width x 100 bytes for a second of speech: 1 MB for a model of the base size (13
  x 768), a tenth of that for a tiny one (5 x 192)
"""


@dataclass(frozen=True)
class CacheOptions:
    """Where hidden states are kept, and how large that folder may grow."""

    folder: str
    limit_gb: float = LIMIT_GB

    @property
    def words(self) -> list[str]:
        """As typed; ``=`` because a value may begin with a dash."""
        words = [f"{OPTION}={self.folder}"]
        return words if self.limit_gb == LIMIT_GB else [*words, f"{LIMIT}={self.limit_gb!r}"]


def split_arguments(argv: Sequence[str]) -> tuple[CacheOptions | None, list[str]]:
    """Our two options, and the other arguments.

    Raises:
        SetupError: the folder is missing, or the limit is no number.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name in (OPTION, LIMIT):
        parser.add_argument(name, nargs="?", const="")
    found, others = parser.parse_known_args(list(argv))
    if found.cache_features is None and found.cache_features_gb is None:
        return None, others
    if not found.cache_features:
        raise SetupError(f"name the folder of the hidden states: {OPTION} result/features")
    text = found.cache_features_gb
    limit = LIMIT_GB if text is None else read_limit(text)
    check_folder(found.cache_features)
    return CacheOptions(found.cache_features, limit), others


def read_limit(text: str) -> float:
    """Gigabytes. Raises SetupError unless ``text`` is a number above 0."""
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise SetupError(f"{LIMIT} {text}: a number of gigabytes above 0 is needed")
    return limit


def check_folder(folder: str) -> None:
    """Raise SetupError where ``folder`` is a file; a student's, as a rule."""
    if Path(folder).exists() and not Path(folder).is_dir():
        raise SetupError(f"{OPTION} {folder}: this is a file; a folder for hidden states is needed")


def check_run(local_rank: str | None) -> None:
    """Raise SetupError for one of several processes (torchrun)."""
    if local_rank is not None or "LOCAL_RANK" in os.environ:
        raise SetupError(
            f"{OPTION} is for one process and not for torchrun; leave it out, or train on one GPU"
        )
