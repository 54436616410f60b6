"""Positions in a frozen teacher: the positional convolution, and WavLM's gated relative bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionalConv:
    """s3prl's ``encoder.pos_conv``: its weight norm is worked out once.

    Args:
        module: ``Sequential(Conv1d with weight norm, SamePad, GELU)``.
        device, dtype: where and what is computed in.
    """

    def __init__(self, module: nn.Sequential, device: torch.device, dtype: torch.dtype):
        conv = module[0]
        if hasattr(conv, "weight_g"):
            # The plain attribute `weight` does not follow the module to a device, and s3prl's
            # forward makes it anew each time: until then it may be ours, one copy for both.
            weight = torch._weight_norm(conv.weight_v, conv.weight_g, 2).detach()
            conv.weight = weight
        else:
            weight = conv.weight.detach()
        self.weight = weight.to(device, dtype)
        self.bias = conv.bias.detach().to(device, dtype)
        self.padding, self.groups = conv.padding, conv.groups
        self.remove = module[1].remove

    def __call__(self, x: Tensor) -> Tensor:
        """``[batch, frame, dim]`` -> the same shape."""
        y = F.conv1d(
            x.transpose(1, 2), self.weight, self.bias, padding=self.padding, groups=self.groups
        )
        y = y[:, :, : y.shape[2] - self.remove].transpose(1, 2)
        return F.gelu(y)


class RelativeBias:
    """WavLM's position bias ``[head, frame, frame]``, made once for each number of frames.

    It depends on the distance of two frames alone, so s3prl's own function is asked for one row of
    distances, and the matrix is laid out from it.

    Args:
        attention: the first layer's, which has the table.
        device, dtype: where and in what it is given.
        keep: how many numbers of frames are kept.
    """

    def __init__(
        self, attention: nn.Module, device: torch.device, dtype: torch.dtype, keep: int = 4
    ):
        self.attention = attention
        self.device, self.dtype = device, dtype
        self.keep = keep
        self._made: dict[int, Tensor] = {}

    def __call__(self, frames: int) -> Tensor:
        if frames not in self._made:
            while len(self._made) >= self.keep:
                self._made.pop(next(iter(self._made)))
            self._made[frames] = self._make(frames)
        return self._made[frames]

    def _make(self, frames: int) -> Tensor:
        distances = torch.arange(1 - frames, frames)  # key minus query
        buckets = self.attention._relative_positions_bucket(distances, bidirectional=True)
        table = self.attention.relative_attention_bias.weight.detach().to(self.device)
        row = table[buckets.to(self.device)].t().to(self.dtype)  # [head, 2 * frames - 1]
        index = torch.arange(frames, device=self.device)
        return row[:, index[None] - index[:, None] + frames - 1].contiguous()


class Gate:
    """How much of the bias each frame and head takes (WavLM, arXiv 2110.13900, section 3.1).

    s3prl adds four outputs of a linear layer for each gate; their weights are added once instead.

    Args:
        attention: s3prl's, with ``grep_linear`` and ``grep_a``.
        device, dtype: where and what is computed in.
    """

    def __init__(self, attention: nn.Module, device: torch.device, dtype: torch.dtype):
        linear = attention.grep_linear
        self.weight = linear.weight.detach().view(2, 4, -1).sum(1).to(device, dtype)
        self.bias = linear.bias.detach().view(2, 4).sum(1).to(device, dtype)
        self.scale = attention.grep_a.detach().to(device, dtype)  # [1, head, 1, 1]
        self.heads = attention.num_heads

    def __call__(self, x: Tensor) -> Tensor:
        """The attention's input ``[batch, frame, dim]`` -> ``[batch, head, frame, 1]``."""
        heads = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        one, two = torch.sigmoid(F.linear(heads, self.weight, self.bias)).split(1, -1)
        return one * (two * self.scale - 1.0) + 2.0
