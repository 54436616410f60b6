"""How far targets computed in padded batches are from those of each utterance alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...data.batches import DistillationDataset
from .build import Tell


class Distance(NamedTuple):
    """``mean`` and ``worst`` absolute difference, as shares of the mean absolute target."""

    mean: float
    worst: float


def distances(
    dataset: DistillationDataset, tell: Tell, device: str, batches: int = 4
) -> Mapping[str, Distance]:
    """Compare over some batches of a training set, spread over its lengths.

    Args:
        dataset: with the cache in it, so that its batches carry the stored targets.
        tell: what computes them; see :func:`.build.targets_of`.
        device: where the teachers are.
        batches: how many.
    """
    step = max(1, len(dataset) // batches)
    sums: dict[str, list[float]] = {}
    for i in range(step // 2, len(dataset), step):
        batch = dataset[i]
        if not batch.names:
            continue
        pairs = zip(batch.waves, batch.lengths.tolist(), strict=True)
        live = tell([wave[:length].to(device) for wave, length in pairs])
        stored, frames = batch.targets.on(device)
        for name, target in live.items():
            count = min(target.shape[2], stored[name].shape[2])
            mask = torch.arange(count, device=frames.device) < frames[:, None]  # [batch, frame]
            mask = mask[:, None, :, None].expand_as(target[:, :, :count])
            apart = (target[:, :, :count] - stored[name][:, :, :count]).abs()[mask]
            sizes = stored[name][:, :, :count].abs()[mask]
            total = sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            total[0] += float(apart.sum(dtype=torch.float64))
            total[1] = max(total[1], float(apart.max()))
            total[2] += float(sizes.sum(dtype=torch.float64))
            total[3] += sizes.numel()
    found = {}
    for name, (apart, worst, size, count) in sums.items():
        found[name] = Distance(apart / size, worst / (size / count)) if size else Distance(0, 0)
    return found
