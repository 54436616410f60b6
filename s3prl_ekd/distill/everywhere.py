"""What the processes of a run must know of each other within a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_first() -> bool:
    """Whether this is the process that speaks: the only one, or the first of several."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def everywhere(*mine: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors of every process, by rank; those given, where there is one process.

    Args:
        mine: of the same shapes and types in all processes, which must all call this.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [mine]
    columns = []
    for tensor in mine:
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(found, tensor.contiguous())
        columns.append(found)
    return list(zip(*columns, strict=True))
