"""What our corpus modules for ``-d ctc`` share: utterances sorted by length, and their buckets."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

Item = tuple[Path, list[int]]  # audio file, token indices


class BucketDataset(Dataset):
    """Utterances sorted by their number of tokens; utterances of equal length keep their order.

    With ``bucket_size`` 1 an item is one :data:`Item`. Otherwise it is a list of ``bucket_size``
    consecutive items, which have similar lengths. There are as many buckets as utterances, so an
    epoch contains each utterance about ``bucket_size`` times.

    Args:
        items: at least one.
        bucket_size: items in a bucket, at most the number of utterances.
        ascending: fewest tokens first; by default most tokens first.
    """

    def __init__(self, items: Sequence[Item], bucket_size: int, ascending: bool = False):
        self.bucket_size = bucket_size
        items = sorted(items, key=lambda item: len(item[1]), reverse=not ascending)
        self.file_list, self.text = zip(*items, strict=True)

    def __getitem__(self, index: int) -> Item | list[Item]:
        if self.bucket_size == 1:
            return self.file_list[index], self.text[index]
        start = max(0, min(len(self) - self.bucket_size, index))
        bucket = slice(start, start + self.bucket_size)
        return list(zip(self.file_list[bucket], self.text[bucket], strict=True))

    def __len__(self) -> int:
        return len(self.file_list)


def as_list(value: str | Sequence[str]) -> list[str]:
    """Accept a single name in place of a list, as s3prl's YAML does."""
    return [value] if isinstance(value, str) else list(value)


@functools.cache
def warn_once(message: str) -> None:
    """Log a message once: s3prl rebuilds its datasets for each epoch and evaluation."""
    logger.warning(message)
