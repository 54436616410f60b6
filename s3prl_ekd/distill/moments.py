"""Running statistics of the teachers' targets, over batches and processes.

Frames that would distort the statistics (:func:`usable_frames`) are left out of them and counted.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Ours: a dimension is constant if its variance is at most this share of the median dimension's,
_FLAT = 1e-6
# or if its deviation is at most this share of its mean (float32 rounding).
ROUNDING = 1e-6
# Ours: an outlier is a frame whose largest value is above FACTOR times the median frame's. Within a
# layer, the largest values of frames differ by a factor of tens, attention sinks included.
FACTOR = 1000.0
LIMIT = 1e15  # the sum of a million squares of such values is finite in float32


def usable_frames(frames: Tensor) -> Tensor:
    """Find the frames for statistics: ``frames [frame, target, dim]`` -> bool ``[frame]``.

    A frame is left out if, in one of its targets, a value is not finite or the largest value is
    above :data:`FACTOR` times the median frame's.
    """
    peaks = frames.abs().amax(-1)  # [frame, target]
    usable = peaks.isfinite().all(-1)
    if not usable.any():
        return usable
    median = peaks[usable].median(0).values
    limits = torch.where(median > 0, FACTOR * median, LIMIT).clamp(max=LIMIT)
    return usable & (peaks <= limits).all(-1)


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process is rank 0, or the only one."""
    return world_size() == 1 or dist.get_rank() == 0


def all_gather(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Gather tensors from all processes, in order of rank; with one process, ``[tensors]``.

    Args:
        tensors: of equal shapes and types in all processes; every process must call this.
    """
    if world_size() == 1:
        return [tensors]
    columns = []
    for tensor in tensors:
        gathered = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        columns.append(gathered)
    return list(zip(*columns, strict=True))


class Moments(nn.Module):
    """Running count, mean and covariance (``full``) or variance of frames, exact over batches."""

    count: Tensor
    mean: Tensor  # [target, dim]
    scatter: Tensor  # sum of squared (or outer products of) differences from the mean
    left_out: Tensor  # frames
    transform: Tensor  # [target, dim, dim]: last PHI-S transform, stored for exact resuming

    def __init__(self, targets: int, width: int, full: bool):
        super().__init__()
        self.full = full
        shape = (targets, width, width) if full else (targets, width)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(targets, width))
        self.register_buffer("scatter", torch.zeros(shape))
        self.register_buffer("left_out", torch.zeros((), dtype=torch.long))
        if full:
            self.register_buffer("transform", torch.eye(width).repeat(targets, 1, 1))

    @torch.no_grad()
    def update(self, hidden: Tensor, mask: Tensor) -> None:
        """Add the valid frames of ``hidden [batch, target, frame, dim]``; ``mask [batch, frame]``.

        With several processes, each adds the frames of all in order of rank, so that the statistics
        are equal in all.
        """
        frames = hidden.transpose(1, 2)[mask.bool()].float()  # [valid frame, target, dim]
        usable = usable_frames(frames)
        left_out = (~usable).sum()
        frames = frames[usable]
        mean = frames.sum(0) / max(len(frames), 1)
        centred = frames - mean
        if self.full:
            scatter = torch.einsum("ntd,nte->tde", centred, centred)
        else:
            scatter = centred.square().sum(0)
        count = torch.tensor(float(len(frames)), dtype=torch.float64, device=mean.device)
        for *moments, rank_left_out in all_gather(count, mean, scatter, left_out):
            self._merge(*moments)
            self.left_out += rank_left_out

    def _merge(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        """Chan's formula, which is exact and stable for large means."""
        if not count:
            return
        shift = mean - self.mean
        share = float(self.count * count / (self.count + count))
        outer = shift[:, :, None] * shift[:, None] if self.full else shift.square()
        self.scatter += scatter + share * outer
        self.count += count
        self.mean += shift * float(count / self.count)

    @property
    def covariance(self) -> Tensor:
        """``[target, dim, dim]``, or variances ``[target, dim]``; divided by n, not n - 1."""
        return self.scatter / self.count.clamp(min=1).float()

    @property
    def flat(self) -> Tensor:
        """Bool ``[target, dim]``: dimensions that are constant, by their variances."""
        median = self.covariance.median(-1, keepdim=True).values
        return self.covariance <= torch.maximum(_FLAT * median, (ROUNDING * self.mean).square())
