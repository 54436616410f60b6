"""Find and read a run's checkpoints: s3prl's ``states-*.ckpt``, our trainer's ``last.ckpt``."""

from __future__ import annotations

import logging
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..compat import checkpoint_globals
from ..errors import CheckpointError
from .formats import NewerFormatError, check_part_versions

logger = logging.getLogger(__name__)

RECORD = "superb.json"  # of `s3prl-ekd superb`, in the folder of each of its runs
LAST_CHECKPOINT = "last.ckpt"  # latest checkpoint of a run of -u ekd; see pretrain/checkpoints.py


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a run's checkpoint without executing code.

    Raises:
        CheckpointError: see :func:`.torch_load.safe_load`; or it lacks ``Step``, ``Args`` or
            ``Config``. NewerFormatError if a newer s3prl_ekd wrote it.
    """
    from .torch_load import safe_load  # which imports torch

    states = safe_load(path, "checkpoint", allow=checkpoint_globals())
    check_part_versions(states, path)
    missing = [key for key in ("Step", "Args", "Config") if key not in states]
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of a run: it has no {missing[0]}")
    for key, kind in (("Args", Namespace), ("Config", dict)):
        if not isinstance(states[key], kind):
            raise CheckpointError(
                f"{path} is not a checkpoint of a run: {key} must be a {kind.__name__}, got "
                f"{type(states[key]).__name__}"
            )
    return states


def run_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a run's folder from which it can be resumed, sorted by name."""
    paths = sorted(Path(folder).glob("states-*.ckpt"))
    last = Path(folder) / LAST_CHECKPOINT
    return [*paths, last] if last.is_file() else paths


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the highest step in a run's folder; None if there is none.

    s3prl sorts by the number in the name instead, which puts ``states-epoch-N.ckpt``, the last one
    written, first. Damaged files are skipped with a warning. If two files have the same step, the
    one with a number in its name is returned.

    Raises:
        CheckpointError: none of the checkpoints can be read, or one has a newer format.
    """
    paths = run_checkpoints(folder)
    steps: dict[Path, int] = {}
    for path in paths:
        try:
            steps[path] = int(read_checkpoint(path)["Step"])
        except NewerFormatError:  # resuming from an older one would overwrite this valid one
            raise
        except (CheckpointError, ValueError, TypeError) as error:
            logger.warning("skipped: %s", error)
    for path in sorted(
        steps, key=lambda path: (steps[path], path.name != LAST_CHECKPOINT), reverse=True
    ):
        try:
            verify_checksums(path)
            return path
        except CheckpointError as error:
            logger.warning("skipped: %s", error)
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def newest_step(folder: str | Path) -> int:
    """The step of :func:`newest_checkpoint`; 0 without one."""
    latest = newest_checkpoint(folder)
    return 0 if latest is None else int(read_checkpoint(latest)["Step"])


def verify_checksums(path: str | Path) -> None:
    """Read the whole checkpoint and verify its CRC-32 checksums.

    ``torch.load`` does not, so a flipped bit in the weights would go unnoticed.

    Raises:
        CheckpointError: a checksum is wrong, or the file cannot be read.
    """
    try:
        if not zipfile.is_zipfile(path):
            return  # torch's format before 1.6, which has no checksums
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        problem = f"wrong checksum of {member}" if member else ""
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError):
        problem = "its central directory cannot be read"
    if problem:
        raise CheckpointError(f"the checkpoint {path} is damaged: {problem}")
