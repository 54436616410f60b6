"""Find and look into the checkpoints of a run (``states-*.ckpt`` of s3prl's Runner)."""

from __future__ import annotations

import logging
from pathlib import Path

from .compat import checkpoint_globals
from .errors import CheckpointError
from .safe_load import safe_load

logger = logging.getLogger(__name__)


def read_run(path: str | Path) -> dict:
    """A run's checkpoint as data. Raises CheckpointError; see :func:`.safe_load.safe_load`."""
    states = safe_load(path, "checkpoint", allow=checkpoint_globals())
    missing = [key for key in ("Step", "Args", "Config") if key not in states]
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of a run: it has no {missing[0]}")
    return states


def newest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None.

    s3prl sorts by the number in the name, which puts the last one, ``states-epoch-N.ckpt``, before
    the others. A damaged file is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    paths = sorted(Path(folder).glob("states-*.ckpt"))
    steps: dict[Path, int] = {}
    for path in paths:
        try:
            steps[path] = int(read_run(path)["Step"])
        except (CheckpointError, ValueError, TypeError) as error:
            logger.warning("passed over: %s", error)
    if paths and not steps:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return max(steps, key=steps.get, default=None)
