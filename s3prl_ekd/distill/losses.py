"""The distillation loss: a reconstruction term plus a cosine term, over valid frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TeacherError
from .settings import LossSettings

RECONSTRUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda prediction, target: (prediction - target).abs(),
    "l2": lambda prediction, target: (prediction - target).square(),
    "smooth_l1": lambda prediction, target: F.smooth_l1_loss(prediction, target, reduction="none"),
}
COSINES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_sigmoid": lambda cosine: -F.logsigmoid(cosine),
    "raw": lambda cosine: 1 - cosine,
}


PLAIN = LossSettings()  # L1 and -log sigmoid cos


@dataclass(frozen=True)
class Terms:
    """The two terms of one target set, one value a layer: ``[layer]`` each."""

    reconstruction: Tensor
    cosine: Tensor


def frame_terms(
    prediction: Tensor,
    target: Tensor,
    settings: LossSettings = PLAIN,
    dims: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both terms of every frame: ``[batch, layer, frame]`` each.

    Args:
        prediction: ``[batch, layer, frame, dim]``.
        target: of the same shape.
        settings: which reconstruction and which cosine term.
        dims: how much each dimension weighs, broadcastable to ``prediction``; None: all the same.

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
        root = dims.sqrt()  # an inner product of both then has the weight once
        prediction, target = prediction * root, target * root
    cosine = F.cosine_similarity(prediction, target, dim=-1)
    return reconstruction, COSINES[settings.cosine](cosine)


def distillation_terms(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    settings: LossSettings = PLAIN,
    dims: Tensor | None = None,
    count: Tensor | None = None,
) -> Terms:
    """Reconstruction and cosine term between prediction and target, a value for each layer.

    With the defaults, L1 and −log σ(cos): DistilHuBERT, arXiv 2110.01900, equation 1 (inferred to
    be EKD's loss too).

    Args:
        prediction, target, settings, dims: as for :func:`frame_terms`.
        mask: ``[batch, frame]``, how much a frame counts, 0 where it is padding; ``None`` counts
            every frame, padding too, as s3prl's distiller does.
        count: what the sum over frames is divided by; None: the sum of ``mask``.

    Raises:
        TeacherError: prediction and target differ in shape.
    """
    reconstruction, cosine = frame_terms(prediction, target, settings, dims)
    if mask is None:
        return Terms(reconstruction.mean((0, 2)), cosine.mean((0, 2)))
    weight = mask[:, None].to(reconstruction.dtype)  # [batch, 1, frame]
    count = weight.sum() if count is None else count
    count = torch.where(count > 0, count, 1)  # every frame masked: zero, not NaN
    return Terms(
        (reconstruction * weight).sum((0, 2)) / count, (cosine * weight).sum((0, 2)) / count
    )


def distillation_loss(
    predictions: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | None],
    settings: LossSettings = PLAIN,
    set_weights: Mapping[str, float] | None = None,
    dims: Mapping[str, Tensor] | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over all target sets: their mean of ``reconstruction + cosine_weight * cosine``.

    Layers weigh the same within a set, and sets weigh ``set_weights`` among each other (*ours*; for
    one set this is s3prl's distiller).

    Args:
        predictions, targets: ``{target set: [batch, layer, frame, width]}``.
        masks: ``{target set: [batch, frame]}``; see :func:`distillation_terms`.
        settings: the loss.
        set_weights: the share of each set; None: all the same.
        dims: weights of dimensions for the sets that have them.
        count: see :func:`distillation_terms`; for masks that leave out more than padding.

    Returns:
        The scalar loss, and the scalars it is made of: ``l1`` (or the other reconstruction's name),
        ``cosine`` and ``loss/SET``.
    """
    parts: dict[str, Tensor] = {}
    shares = set_weights or dict.fromkeys(targets, 1.0)
    total = sum(shares[name] for name in targets) or 1.0
    rec_sum = cosine_sum = 0
    for name, target in targets.items():
        weights = (dims or {}).get(name)
        terms = distillation_terms(predictions[name], target, masks[name], settings, weights, count)
        rec, cosine = terms.reconstruction.mean(), terms.cosine.mean()
        parts[f"loss/{name}"] = (rec + settings.cosine_weight * cosine).detach()
        share = shares[name] / total
        rec_sum, cosine_sum = rec_sum + share * rec, cosine_sum + share * cosine
    parts[settings.reconstruction], parts["cosine"] = rec_sum.detach(), cosine_sum.detach()
    return rec_sum + settings.cosine_weight * cosine_sum, parts
