"""HuBERT's criterion (arXiv 2106.07447, section 2.3): predict the units of masked frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class EncodedBatch:
    """Output of the model on a batch with masked frames.

    Attributes:
        hidden: last hidden states, ``[batch, frame, width]``.
        masked: which frames were masked, ``[batch, frame]``.
        penalty: mean square of the conv features.
    """

    hidden: Tensor
    masked: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class StepLoss:
    """The loss, and values for the log."""

    loss: Tensor
    prediction_loss: Tensor  # mean cross entropy, nats, of the masked frames or of the pairs
    accuracy: Tensor  # of the same predictions
    predictions: int  # number of masked frames, or of excerpts
    penalty: Tensor
    spread: Tensor  # see spread()


def spread(hidden: Tensor) -> Tensor:
    """Share of the variance over frames in the power of ``hidden [batch, frame, width]``.

    Near 0, the model has collapsed: its output does not depend on the input any more.
    """
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

    L_m and L_u are mean cross entropies over masked and unmasked frames. (The paper has sums; a
    mean does not depend on the number of masked frames.)

    Args:
        encoded: output of the model.
        labels: ``[batch, frame]``, int64.
        logits: ``[frame, width] -> [frame, unit]``.
        alpha: weight of L_m, 0 to 1; with 1, L_u is not computed.
        penalty: weight of the conv features' mean square.
    """
    hidden = logits(encoded.hidden[encoded.masked])
    targets = labels[encoded.masked]
    masked_loss = cross_entropy(hidden, targets)
    loss = alpha * masked_loss + penalty * encoded.penalty
    unmasked = ~encoded.masked
    if alpha < 1 and unmasked.any():
        unmasked_logits = logits(encoded.hidden[unmasked])
        loss = loss + (1 - alpha) * cross_entropy(unmasked_logits, labels[unmasked])
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
