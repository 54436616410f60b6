"""The distillation loss: a reconstruction term plus a cosine term, averaged over valid frames.

Options of the loss are modules of two kinds. A *term* maps a :class:`Comparison` to a scalar, which
is added to the loss, and scalars for the log. A *weighting* maps :class:`LossWeights` and a
:class:`Comparison` to new weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import Targets
from .frame_counts import FrameCounts, divide
from .settings import LossSettings
from .student_forward import StudentOutput
from .teachers import HiddenStates

RECONSTRUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda prediction, target: (prediction - target).abs(),
    "l2": lambda prediction, target: (prediction - target).square(),
    "smooth_l1": lambda prediction, target: F.smooth_l1_loss(prediction, target, reduction="none"),
}
COSINES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_sigmoid": lambda cosine: -F.logsigmoid(cosine),
    "raw": lambda cosine: 1 - cosine,
}
DEFAULTS = LossSettings()  # L1 and -log sigmoid cos
Logs = dict[str, Tensor]  # name -> scalar


@dataclass(frozen=True)
class Comparison:
    """Predictions and targets of a step, with the teachers' and the student's outputs.

    ``predictions``, ``targets``: ``{target set: [batch, layer, frame, width]}``. ``valid``:
    ``[batch, frame]``, 1 where a frame is valid; ``mask``: the same, but 0 in masked spans.
    ``teachers``: the targets before aggregation, ``{teacher: [batch, layer, frame, dim]}``; empty
    if the cached targets are aggregated; ``raw_teachers``: the same before ``target_norm``.
    ``teacher_weights``: ``{teacher: weight}``. ``states``: ``{teacher: hidden states by layer}``,
    neither normalised nor cropped. ``student``: the student's output, not cropped. ``step``: number
    of the step from 1. ``counts``: denominators of the terms; None: each term is the mean over the
    batch, as with ``loss.reduce: batches``.
    """

    predictions: Targets
    targets: Targets
    mask: Tensor
    valid: Tensor
    teachers: Targets
    raw_teachers: Targets
    teacher_weights: Mapping[str, float]
    states: Mapping[str, HiddenStates]
    student: StudentOutput
    step: int = 1
    counts: FrameCounts | None = None


@dataclass(frozen=True)
class LossWeights:
    """Weights of frames, target sets and dimensions in the loss.

    ``frames``: ``{target set: [batch, frame]}``, 0 where a frame is masked or padding (padding: 1
    with ``loss.mask_padding: false``); None: every frame counts, as in s3prl's distiller.
    ``sets``: ``{target set: weight}``; None: equal weights. ``dims``: ``{target set: weights}``,
    broadcastable to ``[batch, layer, frame, width]``, for sets with unequal weights of dimensions.
    ``frame_count``: divisor of the sum over frames; None: the sum of ``frames``. ``logs``: scalars
    for the log.
    """

    frames: Mapping[str, Tensor | None]
    sets: Mapping[str, float] | None = None
    dims: Mapping[str, Tensor] = field(default_factory=dict)
    frame_count: Tensor | float | None = None
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class LossTerms(NamedTuple):
    """The two terms of the loss, for each frame or each layer."""

    reconstruction: Tensor
    cosine: Tensor


def frame_terms(
    prediction: Tensor,
    target: Tensor,
    settings: LossSettings = DEFAULTS,
    dims: Tensor | None = None,
) -> LossTerms:
    """Reconstruction and cosine term of every frame: ``[batch, layer, frame]`` each.

    Args:
        prediction, target: ``[batch, layer, frame, dim]``.
        settings: the kinds of the two terms.
        dims: weights of dimensions, broadcastable to ``prediction``; None: equal weights.

    Raises:
        TeacherError: prediction and target differ in shape.
    """
    if prediction.shape != target.shape:
        raise TeacherError(
            f"predictions of shape {list(prediction.shape)} do not match targets of shape "
            f"{list(target.shape)} (batch, layer, frame, dim)"
        )
    prediction, target = prediction.float(), target.float()
    error = RECONSTRUCTIONS[settings.reconstruction](prediction, target)
    if dims is None:
        reconstruction = error.mean(-1)
    else:
        dims = dims.to(error).expand_as(error)
        reconstruction = (error * dims).sum(-1) / dims.sum(-1).clamp(min=1e-8)
        root = dims.sqrt()  # so that each weight enters the inner product once
        prediction, target = prediction * root, target * root
    cosine = F.cosine_similarity(prediction, target, dim=-1)
    if not settings.mask_padding:
        # A padded frame of layer 0 is zero, where the gradient of the cosine is 1e8 times too large
        cosine = cosine.masked_fill(~prediction.any(-1), 0.0)
    return LossTerms(reconstruction, COSINES[settings.cosine](cosine))


def distillation_terms(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    settings: LossSettings = DEFAULTS,
    dims: Tensor | None = None,
    count: Tensor | float | None = None,
) -> LossTerms:
    """Reconstruction and cosine term of every layer: ``[layer]`` each.

    With the defaults, L1 and −log σ(cos): DistilHuBERT, arXiv 2110.01900, equation 1 (inferred to
    be EKD's loss too).

    Args:
        prediction, target, settings, dims: as for :func:`frame_terms`.
        mask: ``[batch, frame]``, weights of frames, 0 where a frame is padding; None: every frame
            counts, padding included, as in s3prl's distiller.
        count: divisor of the sum over frames; None: the sum of ``mask``.
    """
    reconstruction, cosine = frame_terms(prediction, target, settings, dims)
    if mask is None:
        return LossTerms(reconstruction.mean((0, 2)), cosine.mean((0, 2)))
    weight = mask[:, None].to(reconstruction.dtype)  # [batch, 1, frame]
    count = weight.sum() if count is None else count
    # with every frame masked: zero, not NaN
    return LossTerms(
        divide((reconstruction * weight).sum((0, 2)), count),
        divide((cosine * weight).sum((0, 2)), count),
    )


def distillation_loss(
    predictions: Targets, targets: Targets, weights: LossWeights, settings: LossSettings = DEFAULTS
) -> tuple[Tensor, Logs]:
    """Weighted mean over target sets of ``reconstruction + cosine_weight * cosine``.

    Layers have equal weights within a set; sets have the weights ``weights.sets`` (*ours*; with one
    set this is the loss of s3prl's distiller).

    Args:
        predictions, targets: ``{target set: [batch, layer, frame, width]}``; at least one set.

    Returns:
        The scalar loss, and scalars for the log: ``l1`` (or another reconstruction's name),
        ``cosine`` and ``loss/SET``.
    """
    logs: Logs = {}
    set_weights = weights.sets or dict.fromkeys(targets, 1.0)
    total = sum(set_weights[name] for name in targets) or 1.0
    reconstruction = cosine = torch.zeros(())
    for name, target in targets.items():
        mask, dims = weights.frames[name], weights.dims.get(name)
        by_layer = distillation_terms(
            predictions[name], target, mask, settings, dims, weights.frame_count
        )
        set_reconstruction, set_cosine = (term.mean() for term in by_layer)
        logs[f"loss/{name}"] = (set_reconstruction + settings.cosine_weight * set_cosine).detach()
        weight = set_weights[name] / total
        reconstruction = reconstruction + weight * set_reconstruction
        cosine = cosine + weight * set_cosine
    logs |= {settings.reconstruction: reconstruction.detach(), "cosine": cosine.detach()}
    return reconstruction + settings.cosine_weight * cosine, logs


class FeaturePenalty(nn.Module):
    """A term: the mean square of the student's conv features (s3prl's ``feat_pen_loss``).

    With ``loss.reduce: frames`` the mean is over valid frames. With ``batches`` it includes
    padding, as in s3prl.
    """

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, comparison: Comparison) -> tuple[Tensor, Logs]:
        squares = comparison.student.features.float().pow(2)  # [batch, frame, channel]
        if comparison.counts is None:
            penalty = squares.mean()
        else:
            by_frame = squares[:, : comparison.valid.shape[1]].mean(-1)
            penalty = divide((by_frame * comparison.valid).sum(), comparison.counts.valid)
        return self.weight * penalty, {"feature_penalty": penalty.detach()}
