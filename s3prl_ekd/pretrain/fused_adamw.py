"""torch's fused AdamW beside s3prl's optimizers: one kernel for all weights, and no wait for the
device. s3prl's ``AdamW_with_schedule`` takes two norms of each weight at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def fused_adamw(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.AdamW:
    """The optimizer of ``optimizer: {name: FusedAdamW, ...}``, over what is trained.

    Weight decay is as written (default: 0.01), and 0 for biases and the weights of normalisations,
    which have one dimension.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [w for w in trained if w.dim() > 1],
            "weight_decay": config.get("weight_decay", 0.01),
        },
        {"params": [w for w in trained if w.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=float(config["lr"]),
        betas=tuple(config.get("betas", (0.9, 0.999))),
        eps=float(config.get("eps", 1e-6)),
        fused=True,
    )


def warmup_schedule(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], total_steps: int
) -> LambdaLR:
    """A straight line up over ``warmup_proportion`` of the steps (default: 0.07, as s3prl's), then
    one down to 0 after the last."""
    return LambdaLR(
        optimizer, _rate(config.get("warmup_proportion", 0.07) * total_steps, total_steps)
    )


def _rate(warmup: float, total: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        up = (step + 1) / warmup if warmup > 0 else 1.0
        down = (total - step) / (total - warmup) if total > warmup else 1.0
        return max(0.0, min(1.0, up, down))

    return rate
