"""Which utterances make a batch: neighbours in length, as many as a limit allows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import DataError
from .tables import Utterance

logger = logging.getLogger(__name__)


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
