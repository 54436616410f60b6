"""Bring each teacher's targets to a common scale before they are aggregated. Off by default.

Hidden states of different teachers share neither scale nor basis, so a plain mean is ruled by the
larger one. ``running`` takes mean and deviation out of every dimension (as UNIC does). ``phi_s``
(PHI-S, arXiv 2410.01680, section 3) rotates so that all dimensions have the same variance and
divides by one number, which keeps the shape of the distribution: directions of little variance are
not blown up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import TeacherShape
from .everywhere import everywhere


class Moments(nn.Module):
    """Count, mean and covariance (or variance) of frames, accumulated exactly over batches.

    Args:
        targets: number of targets of the teacher.
        width: their width.
        full: keep the whole covariance ``[target, dim, dim]``, not its diagonal ``[target, dim]``.
    """

    def __init__(self, targets: int, width: int, full: bool):
        super().__init__()
        self.full = full
        shape = (targets, width, width) if full else (targets, width)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(targets, width))
        self.register_buffer("scatter", torch.zeros(shape))  # sum of squares about the mean
        if full:  # PHI-S, as of its last renewal; in the checkpoint, so that resuming is exact
            self.register_buffer("transform", torch.eye(width).repeat(targets, 1, 1))

    @torch.no_grad()
    def update(self, hidden: Tensor, mask: Tensor) -> None:
        """Add the valid frames of ``hidden [batch, target, frame, dim]``; ``mask [batch, frame]``.

        Chan's merge of two sets of moments: exact, and stable where means are large. Of several
        processes each adds the frames of all.
        """
        frames = hidden.transpose(1, 2)[mask.bool()].float()  # [valid frame, target, dim]
        frames = frames[frames.isfinite().all(-1).all(-1)]  # one NaN would stay in for good
        mean = frames.sum(0) / max(len(frames), 1)
        centred = frames - mean
        if self.full:
            scatter = torch.einsum("ntd,nte->tde", centred, centred)
        else:
            scatter = centred.square().sum(0)
        count = torch.tensor(float(len(frames)), dtype=torch.float64, device=mean.device)
        for each in everywhere(count, mean, scatter):  # in one order, so all processes agree
            self._merge(*each)

    def _merge(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
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
        """``[target, dim, dim]``, or ``[target, dim]`` variances; over n, not n - 1."""
        return self.scatter / self.count.clamp(min=1).float()


class Standardiser(nn.Module):
    """Standardise each teacher's targets; the statistics are part of a run's checkpoint.

    Args:
        teachers: the shapes of the teachers' targets.
        kind: ``running`` or ``phi_s``.
        steps: batches from which the statistics are estimated; they are fixed afterwards.

    Raises:
        TeacherError: PHI-S needs a Hadamard matrix of the teacher's width, and there is none here.
    """

    def __init__(self, teachers: Mapping[str, TeacherShape], kind: str, steps: int):
        super().__init__()
        self.kind, self.steps = kind, steps
        full = kind == "phi_s"
        for name, teacher in teachers.items():
            if full and hadamard(teacher.width) is None:
                raise TeacherError(
                    f"targets.standardise phi_s needs a width of 2^k, 12*2^k or 20*2^k, and {name} "
                    f"has {teacher.width}; use running"
                )
        self.moments = nn.ModuleDict(
            {name: Moments(len(t.targets), t.width, full) for name, t in teachers.items()}
        )
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, hidden: Mapping[str, Tensor], mask: Tensor, learn: bool) -> dict[str, Tensor]:
        """``{teacher: [batch, target, frame, dim]}``, standardised.

        Args:
            hidden: the teachers' targets.
            mask: ``[batch, frame]``, 1 where a frame is valid.
            learn: whether this batch may go into the statistics (training, not evaluation).
        """
        seen = int(self.seen)
        if learn and seen < self.steps:
            for name, states in hidden.items():
                self.moments[name].update(states, mask)
            self.seen += 1
            # PHI-S: a rotation costs an eigendecomposition, so it is renewed at steps 1, 2, 4, ...
            if self.kind == "phi_s" and ((seen + 1) & seen == 0 or seen + 1 == self.steps):
                for moments in self.moments.values():
                    moments.transform.copy_(phi_s(moments.covariance))
        return {name: self._standardised(name, states) for name, states in hidden.items()}

    def learn_nothing(self) -> None:
        """What :meth:`forward` does, without a frame: other processes may have some."""
        empty = {
            name: moments.mean.new_zeros(0, len(moments.mean), 0, moments.mean.shape[1])
            for name, moments in self.moments.items()
        }
        self(empty, torch.zeros(0, 0), learn=True)

    def _standardised(self, name: str, states: Tensor) -> Tensor:
        moments = self.moments[name]
        centred = states.float() - moments.mean[:, None]  # [batch, target, frame, dim]
        if self.kind == "running":
            return centred / moments.covariance.clamp(min=1e-8).sqrt()[:, None]
        return torch.einsum("btfd,tde->btfe", centred, moments.transform)


def phi_s(covariance: Tensor) -> Tensor:
    """The PHI-S transform: columns to multiply centred rows with.

    Args:
        covariance: ``[target, dim, dim]``.

    Returns:
        ``[target, dim, dim]``: rotate to the principal axes, mix them by a Hadamard matrix so that
        each carries the mean variance, and divide by its root.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = values.clamp(min=0).mean(-1).clamp(min=1e-12).rsqrt()
    mix = hadamard(covariance.shape[-1]).to(vectors)
    return (scale[:, None, None] * vectors @ mix.T).float()


@functools.cache
def hadamard(size: int) -> Tensor | None:
    """An orthogonal matrix ``[size, size]`` all of whose entries are ± size^(-1/2), or None.

    Sylvester's doubling of the orders 1, 12 and 20 (the latter two after Paley): 96, 768 and 1024
    are among them.
    """
    for prime in (None, 11, 19):
        order = 1 if prime is None else prime + 1
        factor = size // order
        if size % order == 0 and factor & (factor - 1) == 0:
            matrix = torch.ones(1, 1) if prime is None else _paley(prime)
            while len(matrix) < size:
                matrix = torch.cat(
                    [torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]
                )
            return matrix / size**0.5
    return None


def _paley(prime: int) -> Tensor:
    """Paley's first construction, for a prime of the form 4k + 3: order ``prime + 1``."""
    squares = {i * i % prime for i in range(1, prime)}
    character = [0] + [1 if i in squares else -1 for i in range(1, prime)]
    matrix = torch.ones(prime + 1, prime + 1)
    for i in range(prime):
        for j in range(prime):
            matrix[i + 1, j + 1] = character[(i - j) % prime]
        matrix[i + 1, i + 1] = 1
        matrix[i + 1, 0] = -1
    return matrix
