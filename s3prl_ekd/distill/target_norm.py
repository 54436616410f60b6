"""Normalisation of each teacher's targets before aggregation. Off by default.

Hidden states of different teachers share neither scale nor basis, so a plain mean is dominated by
the larger one. ``mean_std`` normalises each dimension to mean 0 and deviation 1 (after UNIC, arXiv
2408.05088; statistics over the first steps that are then frozen are ours). ``phi_s`` (PHI-S, arXiv
2410.01680, section 3) rotates so that all dimensions have the same variance and divides by one
number, which keeps the shape of the distribution: directions of small variance are not amplified.

Frames that would distort the statistics (:func:`usable_frames`) are left out of them and counted.
Dimensions that do not vary are not divided, which would only amplify rounding errors.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import TeacherShape

logger = logging.getLogger(__name__)

# Ours: a dimension is constant if its variance is at most this share of the median dimension's,
_FLAT = 1e-6
# or if its deviation is at most this share of its mean (float32 rounding).
_ROUNDING = 1e-6
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
        return self.covariance <= torch.maximum(_FLAT * median, (_ROUNDING * self.mean).square())


class TargetNorm(nn.Module):
    """Normalise each teacher's targets; the statistics are saved in checkpoints.

    As in batch normalisation, statistics are updated in train mode only.

    Args:
        teachers: the shapes of the teachers' targets.
        kind: ``mean_std`` or ``phi_s``.
        steps: number of batches after which the statistics are frozen.

    Raises:
        TeacherError: no Hadamard matrix of a teacher's width, which PHI-S needs, is implemented.
    """

    seen: Tensor  # number of batches that have updated the statistics

    def __init__(self, teachers: Mapping[str, TeacherShape], kind: str, steps: int):
        super().__init__()
        self.kind, self.steps = kind, steps
        self.moments = nn.ModuleDict()
        for name, teacher in teachers.items():
            if kind == "phi_s" and hadamard(teacher.width) is None:
                raise TeacherError(
                    f"target_norm: phi_s needs a width of 2^k, 12*2^k or 20*2^k, but {name} "
                    f"has {teacher.width}; use mean_std"
                )
            self.moments[name] = Moments(len(teacher.targets), teacher.width, kind == "phi_s")
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, teachers: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Normalise targets; in train mode, update the statistics first.

        Args:
            teachers: ``{teacher: [batch, target, frame, dim]}``.
            mask: ``[batch, frame]``, 1 where a frame is valid.
        """
        if self.training and self.seen < self.steps:
            self._update(teachers, mask)
        return {name: self._normalise(name, states) for name, states in teachers.items()}

    def empty_step(self) -> None:
        """Run :meth:`forward` without frames, for the all_gather of other processes."""
        means = {name: moments.mean for name, moments in self._moments().items()}
        empty = {
            name: mean.new_zeros(0, len(mean), 0, mean.shape[1]) for name, mean in means.items()
        }
        self(empty, torch.zeros(0, 0))

    def _moments(self) -> dict[str, Moments]:
        return cast("dict[str, Moments]", dict(self.moments.items()))

    def left_out(self) -> dict[str, Tensor]:
        """Scalars for the log: frames left out of the statistics, for teachers with any."""
        counts = {name: moments.left_out for name, moments in self._moments().items()}
        return {f"{name}/frames_left_out": n.float() for name, n in counts.items() if n}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the statistics of a checkpoint.

        Raises:
            TeacherError: the statistics are not finite; version 0.1 did not leave out such frames.
        """
        # missing in checkpoints of version 0.1
        counts = {f"moments.{name}.left_out": torch.zeros(()).long() for name in self.moments}
        result = super().load_state_dict({**counts, **state_dict}, *args, **kwargs)
        for name, moments in self._moments().items():
            if not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
                raise TeacherError(
                    f"the statistics of teacher {name} in the checkpoint are not finite "
                    "(target_norm): they include a frame with a huge value; start a new run under "
                    "another name"
                )
        return result

    def _update(self, teachers: Mapping[str, Tensor], mask: Tensor) -> None:
        self.seen += 1
        seen = int(self.seen)
        for name, states in teachers.items():
            moments = self._moments()[name]
            before = int(moments.left_out)
            moments.update(states, mask)
            count = int(moments.left_out)
            if count and not before and is_main_process():
                logger.warning(
                    "teacher %s: %d frames of a batch have infinite, NaN or huge values; such "
                    "frames are left out of the statistics of target_norm",
                    name,
                    count,
                )
            # The eigendecomposition of PHI-S is slow: only at steps 1, 2, 4, ... and the last.
            if self.kind == "phi_s" and (seen & (seen - 1) == 0 or seen == self.steps):
                moments.transform.copy_(phi_s(moments.covariance, moments.mean))
            if seen == self.steps and is_main_process():
                self._report(name, moments)

    def _report(self, name: str, moments: Moments) -> None:
        """Log the numbers of frames and constant dimensions of statistics that are now frozen."""
        flat = int(moments.flat.sum()) if self.kind == "mean_std" else 0
        logger.log(
            logging.WARNING if moments.left_out or flat else logging.INFO,
            "teacher %s: statistics of %d frames, %d left out%s",
            name,
            int(moments.count),
            int(moments.left_out),
            f"; {flat} dimensions of its targets are constant: centred but not scaled" * bool(flat),
        )

    def _normalise(self, name: str, states: Tensor) -> Tensor:
        moments = self._moments()[name]
        centred = states.float() - moments.mean[:, None]  # [batch, target, frame, dim]
        if self.kind == "mean_std":
            deviation = torch.where(moments.flat, 1.0, moments.covariance.sqrt())
            return centred / deviation[:, None]
        return torch.einsum("btfd,tde->btfe", centred, moments.transform)


def phi_s(covariance: Tensor, mean: Tensor | None = None) -> Tensor:
    """The PHI-S transform ``[target, dim, dim]``, by which centred rows are multiplied from the
    right: a rotation to the principal axes, a Hadamard matrix that spreads the variance evenly over
    all dimensions, and a division by the mean deviation.

    Args:
        covariance: ``[target, dim, dim]``.
        mean: ``[target, dim]``; targets whose deviation is below the rounding error of their mean
            are not scaled.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    variance = values.clamp(min=0).mean(-1)
    least = torch.full_like(variance, 1e-12)
    if mean is not None:
        least = least.maximum((_ROUNDING * mean.double()).square().mean(-1))
    scale = torch.where(variance > least, variance.rsqrt(), 1.0)
    mix = hadamard(covariance.shape[-1])
    assert mix is not None  # TargetNorm has checked the width
    transform: Tensor = scale[:, None, None] * vectors @ mix.to(vectors).T
    return transform.float()


@functools.cache
def hadamard(size: int) -> Tensor | None:
    """An orthogonal matrix ``[size, size]`` with entries ± size^(-1/2); None if not implemented.

    Built by Sylvester's doubling from the orders 1, 12 and 20 (Paley's construction): among others
    96, 768 and 1024.
    """
    for matrix in (torch.ones(1, 1), _paley(11), _paley(19)):
        factor, rest = divmod(size, len(matrix))
        if rest == 0 and factor & (factor - 1) == 0:
            while len(matrix) < size:
                matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
            return matrix / math.sqrt(size)
    return None


def _paley(prime: int) -> Tensor:
    """Paley's first construction, for a prime of the form 4k + 3: order ``prime + 1``."""
    index = torch.arange(prime)
    sign = torch.full((prime,), -1.0)
    sign[index.square() % prime] = 1.0  # of 0 and of the squares modulo the prime
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[1:, 0] = -1.0
    matrix[1:, 1:] = sign[(index[:, None] - index) % prime]
    return matrix
