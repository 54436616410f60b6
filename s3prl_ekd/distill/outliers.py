"""Frames that would spoil statistics: a single one of 1e20 leaves a variance infinite for good."""

from __future__ import annotations

import torch
from torch import Tensor

# Ours. Largest values of frames of one layer lie within a factor of some tens of each other, those
# of attention sinks included.
FACTOR = 1000.0
LIMIT = 1e15  # squares of a million such values have a sum in float32


def usable_frames(frames: Tensor) -> Tensor:
    """Which frames may go into statistics: ``frames [frame, target, dim]`` -> ``[frame]``, bool.

    A frame is left out where, in one of its targets, a value is not finite or the largest is more
    than :data:`FACTOR` times that of the median frame among those given.
    """
    peaks = frames.abs().amax(-1)  # [frame, target]
    usable = peaks.isfinite().all(-1)
    if not usable.any():
        return usable
    median = peaks[usable].median(0).values
    limits = torch.where(median > 0, FACTOR * median, LIMIT).clamp(max=LIMIT)
    return usable & (peaks <= limits).all(-1)
