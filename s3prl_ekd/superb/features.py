"""What becomes of an upstream's kept hidden states once its runs are finished."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..downstream.counts import Counts, read_counts
from ..hidden_states.size import folder_size
from .plan import Run

logger = logging.getLogger(__name__)


def close_features(runs: Sequence[Run], keep: bool) -> None:
    """Say how often the hidden states of one upstream were found, and remove them unless ``keep``.

    Args:
        runs: all of one upstream, finished.
        keep: the folder is the user's, or was asked for.
    """
    first = runs[0]
    if first.features is None or not Path(first.features.folder).is_dir():
        return  # nothing was run now
    folder = Path(first.features.folder)
    total = Counts()
    for run in runs:
        log = run.folder / "log.txt"
        if log.is_file():
            total += read_counts(log.read_text(encoding="utf-8", errors="replace"))
    size = folder_size(folder)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # those of other upstreams are there
            folder.parent.rmdir()
    logger.info(
        "%s: hidden states found %d times, computed %d times, and for %d random excerpts; "
        "%s has %.0f MB%s",
        first.upstream.name,
        total.hits,
        total.misses,
        total.excerpts,
        folder,
        size / 1e6,
        "" if keep else ", removed now",
    )
