"""HuBERT's criterion (arXiv 2106.07447, section 2.3): name the units of the hidden frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class EncodedBatch:
    """``hidden [batch, frame, width]``, ``masked [batch, frame]`` (which were hidden from the
    model), and the mean square of the conv features."""

    hidden: Tensor
    masked: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class StepLoss:
    """``loss`` is what is minimised; the rest is for people."""

    loss: Tensor
    masked_loss: Tensor  # mean cross entropy, nats
    accuracy: Tensor  # of the hidden frames
    frames: int  # hidden ones
    penalty: Tensor
    spread: Tensor  # see spread()


def spread(hidden: Tensor) -> Tensor:
    """The share of the power of ``hidden [batch, frame, width]`` that is not the same for all
    frames: near 0, the model has collapsed and hears nothing any more."""
    flat = hidden.detach().float().flatten(0, 1)
    return flat.var(0, correction=0).sum() / flat.square().mean(0).sum()


def criterion(
    encoded: EncodedBatch,
    labels: Tensor,
    logits: Callable[[Tensor], Tensor],
    alpha: float,
    penalty: float,
) -> StepLoss:
    """``alpha · L_m + (1 - alpha) · L_u + penalty · mean square of the conv features``.

    L_m and L_u are mean cross entropies over the hidden frames and over the others (the paper has
    sums; a mean keeps the loss's size when the mask draws more frames).

    Args:
        encoded: of a batch.
        labels: ``[batch, frame]``, int64.
        logits: ``[frame, width] -> [frame, unit]``.
        alpha: 0 to 1; where it is 1, L_u is not computed.
        penalty: its weight.
    """
    hidden = logits(encoded.hidden[encoded.masked])
    targets = labels[encoded.masked]
    masked_loss = cross_entropy(hidden, targets)
    loss = alpha * masked_loss + penalty * encoded.penalty
    others = ~encoded.masked
    if alpha < 1 and others.any():
        loss = loss + (1 - alpha) * cross_entropy(logits(encoded.hidden[others]), labels[others])
    with torch.no_grad():
        accuracy = (hidden.argmax(-1) == targets).float().mean()
    return StepLoss(
        loss,
        masked_loss.detach(),
        accuracy,
        len(targets),
        encoded.penalty.detach(),
        spread(encoded.hidden),
    )
