"""HardConcrete gates (Louizos et al. 2018, arXiv 1712.01312) with the constants of DPHuBERT's code.

A gate is a random variable between 0 and 1 that multiplies a unit's output: a conv channel, an
attention head, a unit of a feed-forward network, or a whole module. It is exactly 0 with a
probability that can be learned. In training gates are drawn once a forward; in eval mode they have
fixed values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

TEMPERATURE, STRETCH, EPS = 2 / 3, 0.1, 1e-6
# log(alpha) + _SHIFT is the log-odds of an open gate
_SHIFT = -TEMPERATURE * math.log(STRETCH / (1 + STRETCH))
_SOFTENING = 0.8  # of the values in eval mode
_SPREAD = 0.01  # standard deviation of log(alpha) at the start


class Gate(nn.Module):
    """The gates of the units of one layer; multiplies their outputs.

    Args:
        size: number of units, or 1 for a whole module.
        drop: probability at the start that a gate is below one half (``init_mean`` in DPHuBERT's
            code).
        trailing: number of dimensions of the input behind that of the units.
        at_least: number of gates that stay open in eval mode.
        hard: in eval mode gates are 0 or 1, not fractions.

    Attributes:
        values: ``[size]``, of the current forward; set by :meth:`draw`.
    """

    def __init__(
        self, size: int, drop: float, trailing: int = 0, at_least: int = 0, hard: bool = False
    ):
        super().__init__()
        self.trailing, self.at_least, self.hard = trailing, at_least, hard
        start = math.log(1 - drop) - math.log(drop)
        self.log_alpha = nn.Parameter(torch.empty(size).normal_(start, _SPREAD))
        self.values: Tensor = self.log_alpha.detach()

    def __getstate__(self) -> dict[str, Any]:
        # values drawn in training are part of a graph, which cannot be copied
        return {**self.__dict__, "values": self.values.detach()}

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size, (trailing dimensions)]`` -> the same shape."""
        return x * self.values.reshape(-1, *[1] * self.trailing)

    def expected_open(self) -> Tensor:
        """Expected number of open gates, a scalar; differentiable."""
        return (self.log_alpha + _SHIFT).sigmoid().sum()

    def draw(self) -> None:
        """Set ``values`` for a forward: drawn at random in training, fixed in eval mode."""
        self.values = self.sampled() if self.training else self.fixed()

    def sampled(self) -> Tensor:
        """Random values ``[size]``; differentiable."""
        uniform = torch.empty_like(self.log_alpha).uniform_(EPS, 1 - EPS)
        logits = torch.log(uniform / (1 - uniform)) + self.log_alpha
        stretched = (logits / TEMPERATURE).sigmoid() * (1 + 2 * STRETCH) - STRETCH
        return stretched.clamp(0, 1)

    @torch.no_grad()
    def fixed(self) -> Tensor:
        """The values in eval mode, ``[size]``: 0 for as many gates as are expected to be closed."""
        size = len(self.log_alpha)
        closed = min(round(size - self.expected_open().item()), size - self.at_least)
        values = (self.log_alpha / TEMPERATURE * _SOFTENING).sigmoid()
        smallest = values.topk(closed, largest=False).indices
        if self.hard:
            values = torch.ones_like(values)
        values[smallest] = 0
        return values


class KeptLayerNorm(nn.LayerNorm):
    """A layer norm over the channels whose gate is open; closed channels become 0.

    Cutting the closed channels then changes nothing (*ours*; DPHuBERT's layer norms are taken over
    all channels before the cut and over the remaining ones after it).
    """

    def __init__(self, norm: nn.LayerNorm, gate: Gate):
        super().__init__([*norm.normalized_shape], norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self._gate = (gate,)  # in a tuple: it is a submodule of its conv block, not of this module

    def forward(self, x: Tensor) -> Tensor:
        """``[..., channel]`` -> the same shape, in float32."""
        kept = (self._gate[0].values > 0).float()
        x, count = x.float(), kept.sum().clamp(min=1)
        centred = (x - (x * kept).sum(-1, keepdim=True) / count) * kept
        variance = centred.square().sum(-1, keepdim=True) / count
        y = centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return y * kept
