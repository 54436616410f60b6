"""Which utterances make a batch, and the order of the batches.

A batch is of neighbours in length, as many as a limit allows. The order is a function of seed and
epoch, and a pass can begin at any position in it.
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
    """Random numbers that are a function of these four.

    Python's ``hash`` of a text changes from process to process; a digest does not.
    """
    # The one part that may hold a newline comes last, so no two quadruples give the same text.
    text = f"{seed}\n{epoch}\n{role}\n{utterance}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


class FixedOrder(Sampler[int]):
    """Every index in the same order at each pass; of several processes each takes its share."""

    def __init__(self, count: int):
        self.count = count
        self.rank, self.processes = 0, 1

    def __len__(self) -> int:
        return len(range(self.rank, self.count, self.processes))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.count, self.processes))


class EpochOrder(Sampler[tuple[int, int]]):
    """Each pass gives every index once, as ``(epoch, index)``, in the order of its epoch.

    The order depends on seed and epoch alone. The epoch is given with the index: a persistent
    worker process keeps the dataset that it was started with, and would not see an attribute that
    changes in the main process.

    Several processes deal out the passes, laid end to end, like cards: process ``r`` of ``n`` takes
    each ``n``-th batch, from the ``r``-th on. So the sequence is the same for any number of them;
    no batch is left over at the end of a pass, and none is given twice.

    Args:
        count: how many indices.
        seed: of the orders.

    Attributes:
        epoch: number of the next pass, from 0.
        position: how many indices the next pass skips at its start.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self.seed = seed
        self.step = 1
        self.epoch = 0
        self.position = 0

    def go_to(self, epoch: int, position: int, rank: int = 0, processes: int = 1) -> None:
        """Continue after the first ``position`` batches of a pass, counted over all processes."""
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


def bucket(
    rows: Sequence[Utterance], size: int, budget: int = 0, longest: int = 0
) -> list[list[Utterance]]:
    """Cut rows, sorted by length, into batches of neighbours. The last one may be smaller: unlike
    s3prl, a single leftover utterance is kept.

    Args:
        rows: from long to short.
        size: most utterances of a batch; with ``budget`` 0 its number, as in s3prl.
        budget: most samples of a batch, padding counted; 0: any number. A GPU is then as full with
            short utterances as with long ones. One that is longer by itself is a batch by itself.
        longest: samples of an excerpt, which is what is used of longer utterances; 0: all.
    """
    if not budget:
        return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    batches: list[list[Utterance]] = []
    for row in rows:
        # The first one of a batch is its longest: it says how long all of them get.
        fits = batches and (len(batches[-1]) + 1) * used(batches[-1][0], longest) <= budget
        if fits and len(batches[-1]) < size:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def used(row: Utterance, longest: int) -> int:
    """Samples of an utterance that are used."""
    return min(row.length, longest) if longest else row.length


def padding_share(batches: Sequence[Sequence[Utterance]], longest: int = 0) -> float:
    """The share of a pass's samples that are padding, by the tables' lengths."""
    speech = sum(used(row, longest) for batch in batches for row in batch)
    padded = sum(len(batch) * max(used(row, longest) for row in batch) for batch in batches)
    return 1 - speech / padded


def within(rows: Sequence[Utterance], max_timestep: int, min_samples: int) -> list[Utterance]:
    """Drop what s3prl's ``max_timestep`` excludes and what is too short for one frame; the log
    says how many of each.

    Raises:
        DataError: nothing is left.
    """
    kept = [row for row in rows if row.length >= min_samples]
    if len(kept) < len(rows):
        count = len(rows) - len(kept)
        logger.warning("data: left out %d utterances below %d samples", count, min_samples)
    before = len(kept)
    if max_timestep > 0:
        kept = [row for row in kept if row.length < max_timestep]
    elif max_timestep < 0:
        kept = [row for row in kept if row.length > -max_timestep]
    if len(kept) < before:
        logger.info(
            "data: max_timestep %d left out %d utterances", max_timestep, before - len(kept)
        )
    if not kept:
        raise DataError("no utterance is left in the corpus tables; check sets and max_timestep")
    return kept
