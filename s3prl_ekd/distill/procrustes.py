"""One orthogonal map for each teacher and target onto the same target of a reference teacher.

Hidden states of teachers that were trained separately have no common basis: equal dimensions have
little to do with each other, so their mean keeps only a part of each teacher. The orthogonal
Procrustes problem (Schönemann 1966) has a closed form: if ``U S V'`` is the singular value
decomposition of the cross-covariance of two sets of centred frames, ``U V'`` is the rotation (or
reflection) of the first that is nearest to the second. Using it for targets of several teachers is
*ours*.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .moments import all_gather, usable_frames


class CrossMoments(nn.Module):
    """Running means and cross-covariance of a teacher's targets with a reference's, exact over
    batches; and the last rotation that was computed, stored for exact resuming."""

    count: Tensor
    mean: Tensor  # [target, dim]
    reference_mean: Tensor  # [target, dim]
    scatter: Tensor  # [target, dim, dim]: sum of outer products of differences from the means
    rotation: Tensor  # [target, dim, dim]

    def __init__(self, targets: int, width: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(targets, width))
        self.register_buffer("reference_mean", torch.zeros(targets, width))
        self.register_buffer("scatter", torch.zeros(targets, width, width))
        self.register_buffer("rotation", torch.eye(width).repeat(targets, 1, 1))

    @torch.no_grad()
    def update(self, hidden: Tensor, reference: Tensor, mask: Tensor) -> None:
        """Add the valid frames of ``[batch, target, frame, dim]``; ``mask [batch, frame]``.

        With several processes, each adds the frames of all in order of rank.
        """
        x, y = (states.transpose(1, 2)[mask.bool()].float() for states in (hidden, reference))
        usable = usable_frames(x) & usable_frames(y)
        x, y = x[usable], y[usable]  # [frame, target, dim]
        means = [frames.sum(0) / max(len(frames), 1) for frames in (x, y)]
        scatter = torch.einsum("ntd,nte->tde", x - means[0], y - means[1])
        count = torch.tensor(float(len(x)), dtype=torch.float64, device=scatter.device)
        for moments in all_gather(count, *means, scatter):
            self._merge(*moments)

    def _merge(self, count: Tensor, mean: Tensor, reference_mean: Tensor, scatter: Tensor) -> None:
        """Chan's formula for the cross-covariance."""
        if not count:
            return
        shift, reference_shift = mean - self.mean, reference_mean - self.reference_mean
        share = float(self.count * count / (self.count + count))
        self.scatter += scatter + share * shift[:, :, None] * reference_shift[:, None]
        self.count += count
        self.mean += shift * float(count / self.count)
        self.reference_mean += reference_shift * float(count / self.count)

    def solve(self) -> None:
        """Compute the rotation from the statistics so far."""
        self.rotation.copy_(procrustes(self.scatter))

    def correlations(self, variance: Tensor, reference_variance: Tensor) -> tuple[float, float]:
        """Correlation of the teacher's targets with the reference's, before and after the rotation,
        averaged over targets.

        It is the sum of the covariances of equal dimensions, relative to the largest possible one.
        ``variance``, ``reference_variance``: ``[target, dim]``.
        """
        covariance = self.scatter / self.count.clamp(min=1).float()
        size = (variance.sum(-1) * reference_variance.sum(-1)).sqrt().clamp(min=1e-30)
        before = covariance.diagonal(dim1=1, dim2=2).sum(-1) / size  # [target]
        after = (self.rotation * covariance).sum((1, 2)) / size
        return float(before.mean()), float(after.mean())


def procrustes(cross: Tensor) -> Tensor:
    """The orthogonal matrices ``R [target, dim, dim]`` that minimise ``|X R - Y|``, for the
    cross-covariances ``X'Y [target, dim, dim]`` of centred rows."""
    u, _, vt = torch.linalg.svd(cross.double())
    rotation: Tensor = u @ vt
    return rotation.float()
