"""The loss on utterances that are not trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from ..data.batches import Batch
from .random_state import random_numbers_untouched


@torch.no_grad()
def dev_loss(
    upstream: nn.Module, loader: Iterable[Batch], step: int, device: str
) -> tuple[float, float]:
    """The loss over the dev tables, each batch weighted by its samples: the sum, and the weights'.

    Without dropout, and with the same excerpts and distortions at every call. Neither the random
    numbers of the training nor its running statistics know that it took place.

    Args:
        upstream: the adapter; in train mode before and after.
        loader: its dev batches.
        step: updates done; teacher weights may follow from it.
        device: of the run.
    """
    total = samples = 0.0
    upstream.eval()
    try:
        with random_numbers_untouched(device):
            for batch in tqdm(loader, dynamic_ncols=True, desc="dev", leave=False):
                loss, _ = upstream(batch, defaultdict(list), global_step=step, log_step=step + 1)
                weight = float(batch.lengths.sum())
                total += loss.item() * weight
                samples += weight
    finally:
        upstream.train()
    return total, samples
