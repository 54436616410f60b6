"""Normalisation of each teacher's targets before aggregation. Off by default.

Hidden states of different teachers share neither scale nor basis, so a plain mean is dominated by
the larger one. ``mean_std`` normalises each dimension to mean 0 and deviation 1 (after UNIC, arXiv
2408.05088; statistics over the first steps that are then frozen are ours). ``phi_s`` (PHI-S, arXiv
2410.01680, section 3) rotates so that all dimensions have the same variance and divides by one
number, which keeps the shape of the distribution: directions of small variance are not amplified.
``procrustes`` (*ours*) subtracts the mean, divides by one number, and rotates the targets of each
teacher but the first onto those of the first, so that all have one basis (:mod:`.procrustes`).

Frames that would distort the statistics are left out of them and counted. Dimensions that do not
vary are not divided, which would only amplify rounding errors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import TeacherShape, one_width
from .moments import ROUNDING, Moments, is_main_process
from .phi_s import hadamard, phi_s
from .procrustes import CrossMoments

logger = logging.getLogger(__name__)


class TargetNorm(nn.Module):
    """Normalise each teacher's targets; the statistics are saved in checkpoints.

    As in batch normalisation, statistics are updated in train mode only.

    Args:
        teachers: the shapes of the teachers' targets.
        kind: ``mean_std``, ``phi_s`` or ``procrustes``.
        steps: number of batches after which the statistics are frozen.

    Raises:
        TeacherError: no Hadamard matrix of a teacher's width, which PHI-S needs, is implemented; or
            the teachers differ in width, and Procrustes needs one width.
    """

    seen: Tensor  # number of batches that have updated the statistics

    def __init__(self, teachers: Mapping[str, TeacherShape], kind: str, steps: int):
        super().__init__()
        self.kind, self.steps = kind, steps
        self.moments = nn.ModuleDict()
        self.cross = nn.ModuleDict()  # of procrustes: all teachers but the reference
        self.reference = next(iter(teachers))
        if kind == "procrustes":
            one_width(teachers, "target_norm: procrustes", "another target_norm")
        for name, teacher in teachers.items():
            if kind == "phi_s" and hadamard(teacher.width) is None:
                raise TeacherError(
                    f"target_norm: phi_s needs a width of 2^k, 12*2^k or 20*2^k, but {name} "
                    f"has {teacher.width}; use mean_std"
                )
            self.moments[name] = Moments(len(teacher.targets), teacher.width, kind == "phi_s")
            if kind == "procrustes" and name != self.reference:
                self.cross[name] = CrossMoments(len(teacher.targets), teacher.width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.batches = 0  # the value of `seen`, to be read without waiting for the device

    @torch.no_grad()
    def forward(self, teachers: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Normalise targets; in train mode, update the statistics first.

        Args:
            teachers: ``{teacher: [batch, target, frame, dim]}``.
            mask: ``[batch, frame]``, 1 where a frame is valid.
        """
        device = next(iter(teachers.values())).device
        with torch.autocast(device.type, enabled=False):  # sums over frames overflow in float16
            if self.training and self.batches < self.steps:
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

    def _cross(self) -> dict[str, CrossMoments]:
        return cast("dict[str, CrossMoments]", dict(self.cross.items()))

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
        self.batches = int(self.seen)
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
        self.batches = seen = self.batches + 1
        for name, states in teachers.items():
            moments = self._moments()[name]
            before = int(moments.left_out)
            moments.update(states, mask)
            left_out = int(moments.left_out)
            if left_out and not before and is_main_process():
                logger.warning(
                    "teacher %s: %d frames of a batch have infinite, NaN or huge values; such "
                    "frames are left out of the statistics of target_norm",
                    name,
                    left_out,
                )
            # The decompositions are slow: only at steps 1, 2, 4, ... and the last.
            due = seen & (seen - 1) == 0 or seen == self.steps
            if self.kind == "phi_s" and due:
                moments.transform.copy_(phi_s(moments.covariance, moments.mean))
            if seen == self.steps and is_main_process():
                self._report(name, moments)
            if name not in self.cross:
                continue
            cross = self._cross()[name]
            cross.update(states, teachers[self.reference], mask)
            if due:
                cross.solve()
            if seen == self.steps and is_main_process():
                reference = self._moments()[self.reference]
                plain, rotated = cross.correlations(moments.covariance, reference.covariance)
                logger.info(
                    "teacher %s: correlation with %s %.3f, %.3f after the rotation",
                    name,
                    self.reference,
                    plain,
                    rotated,
                )

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
        if self.kind == "procrustes":
            variance = moments.covariance.mean(-1)  # [target], over dimensions
            least = (ROUNDING * moments.mean).square().mean(-1).clamp(min=1e-12)
            scale = torch.where(variance > least, variance.rsqrt(), 1.0)
            centred = centred * scale[:, None, None]
            if name not in self.cross:
                return centred
            return torch.einsum("btfd,tde->btfe", centred, self._cross()[name].rotation)
        return torch.einsum("btfd,tde->btfe", centred, moments.transform)
