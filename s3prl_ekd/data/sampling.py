"""Bucketing of utterances into batches, and samplers for the order of the batches.

A batch has utterances of similar length. The order of the batches is a function of seed and epoch,
and a pass can start at any position in it.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ..errors import DataError
from .tables import Utterance

logger = logging.getLogger(__name__)


def generator(seed: int, epoch: int, utterance: str, role: str) -> random.Random:
    """Make a random generator whose seed is a digest of the arguments.

    Python's ``hash`` would not do: for a string it differs from process to process.
    """
    # Only the utterance may contain a newline. It comes last, so the text is unique.
    text = f"{seed}\n{epoch}\n{role}\n{utterance}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


class FixedOrderSampler(Sampler[int]):
    """Sample indices in ascending order; each of several processes gets every n-th index."""

    def __init__(self, count: int):
        self.count = count
        self.rank, self.processes = 0, 1

    def __len__(self) -> int:
        return len(range(self.rank, self.count, self.processes))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.count, self.processes))


class EpochSampler(Sampler[tuple[int, int]]):
    """Sample every index once a pass, as ``(epoch, index)``, in a random order for each epoch.

    The order depends on seed and epoch only. The epoch is yielded with the index because a
    persistent worker process has its own copy of the dataset, and would not see an attribute that
    the main process sets.

    With several processes, the passes form one long sequence, from which process ``r`` of ``n``
    takes every ``n``-th batch, starting with the ``r``-th. So the sequence is the same for any
    number of processes, and no batch is dropped or repeated at the end of a pass.

    Attributes:
        epoch: number of the next pass, from 0.
        position: number of indices that the next pass skips at its start.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self.seed = seed
        self.processes = 1
        self.epoch = 0
        self.position = 0

    def seek(self, epoch: int, position: int, rank: int = 0, processes: int = 1) -> None:
        """Resume an epoch after its first ``position`` batches, counted over all processes."""
        self.processes = processes
        passes, self.position = divmod(position + rank, self.count)
        self.epoch = epoch + passes

    def __len__(self) -> int:
        return self.count

    def order(self, epoch: int) -> list[int]:
        """Return all indices in the order of an epoch."""
        seed = generator(self.seed, epoch, "", "order").getrandbits(63)
        torch_generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.count, generator=torch_generator).tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Not a generator function: it would update the epoch only when the first index is taken.
        epoch, position = self.epoch, self.position
        count = len(range(position, self.count, self.processes))  # indices of this pass
        passes, self.position = divmod(position + count * self.processes, self.count)
        self.epoch = epoch + passes
        return ((epoch, index) for index in self.order(epoch)[position :: self.processes])


class OrderedEpochSampler(EpochSampler):
    """An :class:`EpochSampler` in ascending order, for datasets that shuffle by themselves."""

    def order(self, epoch: int) -> list[int]:
        """Return all indices in ascending order."""
        return list(range(self.count))


def bucket(
    rows: Sequence[Utterance], max_utterances: int, max_samples: int = 0, max_length: int = 0
) -> list[list[Utterance]]:
    """Cut rows, sorted by length, into batches of similar length.

    The last batch may be smaller. Unlike in s3prl, it is kept even if it is a single utterance.

    Args:
        rows: from long to short.
        max_utterances: largest number of utterances in a batch; the exact number, as in s3prl, if
            ``max_samples`` is 0.
        max_samples: largest number of samples in a batch, including padding; 0: no limit. It keeps
            a GPU equally full with short and long utterances. A single utterance may exceed it.
        max_length: length in samples of the excerpt of longer utterances; 0: no excerpts.
    """
    if not max_samples:
        return [list(rows[i : i + max_utterances]) for i in range(0, len(rows), max_utterances)]
    batches: list[list[Utterance]] = []
    for row in rows:
        # The first utterance of a batch is its longest; the others are padded to it.
        fits = batches and (len(batches[-1]) + 1) * used(batches[-1][0], max_length) <= max_samples
        if fits and len(batches[-1]) < max_utterances:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def used(row: Utterance, max_length: int) -> int:
    """Number of samples of an utterance's excerpt, or of the utterance if it is not longer."""
    return min(row.length, max_length) if max_length else row.length


def padding_share(batches: Sequence[Sequence[Utterance]], max_length: int = 0) -> float:
    """Share of padding among the samples of a pass, according to the tables."""
    valid = sum(used(row, max_length) for batch in batches for row in batch)
    padded = sum(len(batch) * max(used(row, max_length) for row in batch) for batch in batches)
    return 1 - valid / padded


def filter_by_length(
    rows: Sequence[Utterance], max_timestep: int, min_samples: int
) -> list[Utterance]:
    """Drop utterances shorter than one frame or excluded by s3prl's ``max_timestep``.

    Both counts are logged.
    """
    long_enough = [row for row in rows if row.length >= min_samples]
    if len(long_enough) < len(rows):
        count = len(rows) - len(long_enough)
        logger.warning("data: left out %d utterances below %d samples", count, min_samples)
    result = long_enough
    if max_timestep > 0:
        result = [row for row in long_enough if row.length < max_timestep]
    elif max_timestep < 0:
        result = [row for row in long_enough if row.length > -max_timestep]
    if len(result) < len(long_enough):
        count = len(long_enough) - len(result)
        logger.info("data: left out %d utterances by max_timestep %d", count, max_timestep)
    if not result:
        raise DataError(
            "no utterance is left in the length tables; check sets and max_timestep of "
            "pretrain_expert.datarc"
        )
    return result
