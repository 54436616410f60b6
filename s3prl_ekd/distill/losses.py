"""The distillation loss: mean absolute error plus a cosine term, over valid frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..errors import TeacherError


@dataclass(frozen=True)
class Terms:
    """The two terms of one target set, one value a layer: ``[layer]`` each."""

    l1: Tensor
    cosine: Tensor


def distillation_terms(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Terms:
    """L1 and −log σ(cos) between prediction and target, a value for each layer.

    DistilHuBERT, arXiv 2110.01900, equation 1 (inferred to be EKD's loss too).

    Args:
        prediction: ``[batch, layer, frame, dim]``.
        target: of the same shape.
        mask: ``[batch, frame]``, 1 where a frame counts and 0 where it is padding; ``None`` counts
            every frame, padding too, as s3prl's distiller does.

    Raises:
        TeacherError: prediction and target differ in shape.
    """
    if prediction.shape != target.shape:
        raise TeacherError(
            f"predictions of shape {list(prediction.shape)} do not match targets of shape "
            f"{list(target.shape)} (batch, layer, frame, dim)"
        )
    prediction, target = prediction.float(), target.float()
    l1 = (prediction - target).abs().mean(-1)  # [batch, layer, frame]
    cosine = -F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1))
    if mask is None:
        return Terms(l1.mean((0, 2)), cosine.mean((0, 2)))
    weight = mask[:, None].to(l1.dtype)  # [batch, 1, frame]
    count = weight.sum().clamp(min=1)  # every frame masked: zero, not NaN
    return Terms((l1 * weight).sum((0, 2)) / count, (cosine * weight).sum((0, 2)) / count)


def distillation_loss(
    predictions: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    mask: Tensor | None,
    cosine_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over all target sets: their mean of ``l1 + cosine_weight * cosine``.

    Layers weigh the same within a set and sets weigh the same among each other (*ours*; for one
    set this is s3prl's distiller).

    Returns:
        The scalar loss, and the scalars it is made of: ``l1``, ``cosine`` and ``loss/SET``.
    """
    parts: dict[str, Tensor] = {}
    l1_sum = cosine_sum = 0
    for name, target in targets.items():
        terms = distillation_terms(predictions[name], target, mask)
        l1, cosine = terms.l1.mean(), terms.cosine.mean()
        parts[f"loss/{name}"] = (l1 + cosine_weight * cosine).detach()
        l1_sum, cosine_sum = l1_sum + l1, cosine_sum + cosine
    l1, cosine = l1_sum / len(targets), cosine_sum / len(targets)
    parts["l1"], parts["cosine"] = l1.detach(), cosine.detach()
    return l1 + cosine_weight * cosine, parts
