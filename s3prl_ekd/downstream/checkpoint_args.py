"""``-e``: what s3prl's scripts take from the arguments that a checkpoint holds, and what not.

s3prl lets the arguments in the checkpoint override those of the command. Among them are the folder
that the run writes to and the one that downloads go to; a file that was copied, renamed or made by
somebody else would then decide where this command writes.
"""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replaced_arguments(checkpoint: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Within it, ``torch.load`` of ``checkpoint`` gives ``Args`` with ``values`` put into it.

    Args:
        checkpoint: the path, as it stands after ``-e``.
        values: s3prl's argument -> what the command decides it to be.
    """
    load = torch.load

    def load_with_values(f: Any, *args: Any, **kwargs: Any) -> Any:
        states = load(f, *args, **kwargs)
        recorded = states.get("Args") if isinstance(states, dict) else None
        if str(f) == checkpoint and isinstance(recorded, Namespace):
            vars(recorded).update(values)
        return states

    torch.load = load_with_values
    try:
        yield
    finally:
        torch.load = load


def say_moved(checkpoint: Path, recorded: Any, folder: Path) -> None:
    """Log where a run writes, if its checkpoint has another folder recorded."""
    if not isinstance(recorded, str) or Path(recorded).resolve() != folder.resolve():
        logger.info(
            "%s was saved in the folder %.200r; this command writes to %s",
            checkpoint,
            recorded,
            folder,
        )
