"""The order of the batches: a function of seed and epoch, which can be entered in the middle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .distortion.plan import generator


class EpochOrder(Sampler):
    """Each pass gives every index once, as ``(epoch, index)``, in the order of its epoch.

    No other random number plays a part, so a pass is the same whenever and wherever it is made. The
    epoch travels with the index: a persistent worker process keeps the dataset it was started
    with, and would not see an attribute that changes in the main process.

    Args:
        count: how many indices.
        seed: another seed, other orders.

    Attributes:
        epoch: number of the next pass, from 0.
        position: how many indices the next pass leaves out at its begin; the passes after it leave
            out none. A resumed run sets these two.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self.seed = seed
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        return self.count

    def order(self, epoch: int) -> list[int]:
        """All indices in the order of an epoch."""
        source = torch.Generator()
        source.manual_seed(generator(self.seed, epoch, "", "order").getrandbits(63))
        return torch.randperm(self.count, generator=source).tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Not a generator function: that would count an epoch at its first index only.
        epoch, position = self.epoch, self.position
        self.epoch, self.position = epoch + 1, 0
        return ((epoch, index) for index in self.order(epoch)[position:])
