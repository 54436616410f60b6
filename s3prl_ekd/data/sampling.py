"""The order of the batches: a function of seed and epoch, which can be entered in the middle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .distortion.plan import generator


class FixedOrder(Sampler):
    """Every index in the same order at each pass; of several processes each takes its share."""

    def __init__(self, count: int):
        self.count = count
        self.rank, self.processes = 0, 1

    def __len__(self) -> int:
        return len(range(self.rank, self.count, self.processes))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.count, self.processes))


class EpochOrder(Sampler):
    """Each pass gives every index once, as ``(epoch, index)``, in the order of its epoch.

    No other random number plays a part, so a pass is the same whenever and wherever it is made. The
    epoch travels with the index: a persistent worker process keeps the dataset it was started
    with, and would not see an attribute that changes in the main process.

    Several processes deal out the passes, laid end to end, like cards: process ``r`` of ``n`` takes
    each ``n``-th batch, from the ``r``-th on. So the sequence is the same for any number of them;
    no batch is left over at the end of a pass, and none is given twice.

    Args:
        count: how many indices.
        seed: another seed, other orders.

    Attributes:
        epoch: number of the next pass, from 0.
        position: how many indices the next pass leaves out at its begin.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self.seed = seed
        self.step = 1
        self.epoch = 0
        self.position = 0

    def go_to(self, epoch: int, position: int, rank: int = 0, processes: int = 1) -> None:
        """Begin after the first ``position`` batches of a pass, counted over all processes."""
        self.step = processes
        passes, self.position = divmod(position + rank, self.count)
        self.epoch = epoch + passes

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
        taken = range(position, self.count, self.step)
        after = position + len(taken) * self.step  # in passes laid end to end
        passes, self.position = divmod(after, self.count)
        self.epoch = epoch + passes
        return ((epoch, index) for index in self.order(epoch)[position :: self.step])
