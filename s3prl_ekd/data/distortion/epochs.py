"""A sampler that tells the dataset which epoch an index belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """The indices of another sampler as ``(epoch, index)``; each pass over it is an epoch.

    The epoch travels with the index: a persistent worker process keeps the dataset it was
    started with, and would not see an attribute that changes in the main process.

    Args:
        sampler: gives the indices of one pass, in its order.

    Attributes:
        epoch: number of the next pass, from 0; a resumed run may set it.
    """

    def __init__(self, sampler: Iterable[int]):
        self.sampler = sampler
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Not a generator function: that would count an epoch at its first index only.
        epoch = self.epoch
        self.epoch += 1
        return ((epoch, index) for index in self.sampler)
