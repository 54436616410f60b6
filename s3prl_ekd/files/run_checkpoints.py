"""Find and look into the checkpoints of a run: ``states-*.ckpt`` of s3prl's Runners, and the
``last.ckpt`` that ours writes between them."""

from __future__ import annotations

import logging
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..compat import checkpoint_globals
from ..errors import CheckpointError
from .formats import NewerFormatError, refuse_newer_parts
from .torch_load import safe_load

logger = logging.getLogger(__name__)

LAST = "last.ckpt"  # where a run of -u ekd stands; see pretrain/checkpoints.py


def read_run(path: str | Path) -> dict[str, Any]:
    """A run's checkpoint as data.

    Raises:
        CheckpointError: see :func:`.torch_load.safe_load`; NewerFormatError where a newer
            s3prl_ekd wrote it.
    """
    states = safe_load(path, "checkpoint", allow=checkpoint_globals())
    refuse_newer_parts(states, path)
    missing = [key for key in ("Step", "Args", "Config") if key not in states]
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of a run: it has no {missing[0]}")
    for key, kind, what in (("Args", Namespace, "arguments"), ("Config", dict, "configuration")):
        if not isinstance(states[key], kind):
            raise CheckpointError(
                f"{path} is no checkpoint of a run: it has no {what} but a "
                f"{type(states[key]).__name__}"
            )
    return states


def run_checkpoints(folder: str | Path) -> list[Path]:
    """The files in a run's folder that it can be resumed from, by name."""
    paths = sorted(Path(folder).glob("states-*.ckpt"))
    last = Path(folder) / LAST
    return [*paths, last] if last.is_file() else paths


def newest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None.

    s3prl sorts by the number in the name, which puts the last one, ``states-epoch-N.ckpt``, before
    the others. A damaged file is passed over with a warning. Of two files of one step the one with
    a number in its name is given.

    Raises:
        CheckpointError: there are checkpoints, and none can be read, or one is of a newer format.
    """
    paths = run_checkpoints(folder)
    steps: dict[Path, int] = {}
    for path in paths:
        try:
            steps[path] = int(read_run(path)["Step"])
        except NewerFormatError:  # it is whole, and the run would go on from an older one over it
            raise
        except (CheckpointError, ValueError, TypeError) as error:
            logger.warning("passed over: %s", error)
    for path in sorted(steps, key=lambda path: (steps[path], path.name != LAST), reverse=True):
        try:
            check_whole(path)
            return path
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def check_whole(path: str | Path) -> None:
    """Read a checkpoint to its end and compare its checksums, which ``torch.load`` does not.

    A changed bit among the weights would go unseen otherwise.

    Raises:
        CheckpointError: a checksum is wrong, or the file cannot be read.
    """
    try:
        if not zipfile.is_zipfile(path):
            return  # torch's format before 1.6, which has no checksums
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError):
        broken = "its list of contents"
    if broken:
        raise CheckpointError(f"the checkpoint {path} is damaged: {broken} is not as written")
