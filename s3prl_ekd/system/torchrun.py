"""torchrun: its command, and the environment variables that it sets."""

from __future__ import annotations

import os
from collections.abc import Sequence


def torchrun_command(argv: Sequence[str], processes: int) -> list[str]:
    """``argv`` (``run_pretrain.py ...``), to type, in several processes with a GPU each."""
    if processes == 1:
        return list(argv)
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}", "-m", "s3prl_ekd", *argv]


def processes() -> int:
    """The number of processes that torchrun has started; 1 without it."""
    return _number("WORLD_SIZE", 1)


def is_distributed() -> bool:
    """Whether torchrun has started more than one process."""
    return processes() > 1


def rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return _number("RANK", 0) if is_distributed() else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
