"""Transformer layers of a frozen teacher: one product for q, k and v, fused attention, positions.

Positions are the positional convolution and WavLM's gated relative bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # WavLM has classes of the same names
    from s3prl.upstream.wav2vec2.wav2vec2_model import (
        MultiheadAttention,
        TransformerSentenceEncoderLayer,
    )

Norm = tuple[tuple[int, ...], Tensor, Tensor, float]  # shape, weight, bias, epsilon


class PositionalConv:
    """s3prl's ``encoder.pos_conv``: its weight norm is worked out once.

    Args:
        module: ``Sequential(Conv1d with weight norm, SamePad, GELU)``.
        device, dtype: where and what is computed in.
    """

    def __init__(self, module: nn.Sequential, device: torch.device, dtype: torch.dtype):
        conv: Any = module[0]
        pad: Any = module[1]
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
        self.remove = pad.remove

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
        self, attention: MultiheadAttention, device: torch.device, dtype: torch.dtype, keep: int = 4
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

    def __init__(self, attention: MultiheadAttention, device: torch.device, dtype: torch.dtype):
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


class Layer:
    """What s3prl's ``TransformerSentenceEncoderLayer`` computes in eval mode.

    In float32 its weights are the module's own: q, k and v are laid side by side once, and the
    module's parameters become views of that. In half precision they are copies.

    Args:
        module: the layer of HuBERT, wav2vec 2.0 or WavLM; see :func:`is_known`.
        device, dtype: where and what is computed in.
    """

    def __init__(
        self, module: TransformerSentenceEncoderLayer, device: torch.device, dtype: torch.dtype
    ):
        attention = module.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        shared = dtype == torch.float32

        def take(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype)

        def norm(layer: nn.LayerNorm) -> Norm:
            return layer.normalized_shape, take(layer.weight), take(layer.bias), layer.eps

        self.heads = attention.num_heads
        self.first = module.layer_norm_first
        self.qkv = _side_by_side(parts, "weight", device, dtype, shared)
        self.qkv_bias = _side_by_side(parts, "bias", device, dtype, shared)
        self.out = take(attention.out_proj.weight), take(attention.out_proj.bias)
        self.up = take(module.fc1.weight), take(module.fc1.bias)
        self.down = take(module.fc2.weight), take(module.fc2.bias)
        self.attention_norm = norm(module.self_attn_layer_norm)
        self.final_norm = norm(module.final_layer_norm)
        self.activation = _in_place(module.activation_fn)
        self.gate = Gate(attention, device, dtype) if hasattr(attention, "grep_linear") else None

    def __call__(self, x: Tensor, bias: Tensor | None, keys: Tensor | None) -> Tensor:
        """The layer's output.

        Args:
            x: ``[batch, frame, dim]``, left as it is.
            bias: WavLM's position bias ``[head, frame, frame]``, or None.
            keys: what is added to the scores of each key, 0 or -inf, ``[batch, 1, 1, frame]``, or
                None without padding.
        """
        y = F.layer_norm(x, *self.attention_norm) if self.first else x
        y = self._attend(y, self._scores(y, bias, keys)).add_(x)
        if not self.first:
            y = F.layer_norm(y, *self.attention_norm)
        z = F.layer_norm(y, *self.final_norm) if self.first else y
        z = self.activation(F.linear(z, *self.up))
        y = F.linear(z, *self.down).add_(y)
        return y if self.first else F.layer_norm(y, *self.final_norm)

    def _attend(self, x: Tensor, scores: Tensor | None) -> Tensor:
        batch, frames, dim = x.shape
        qkv = F.linear(x, self.qkv, self.qkv_bias).view(batch, frames, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [batch, head, frame, dim of a head]
        mixed = F.scaled_dot_product_attention(q, k, v, scores)
        return F.linear(mixed.transpose(1, 2).reshape(batch, frames, dim), *self.out)

    def _scores(self, x: Tensor, bias: Tensor | None, keys: Tensor | None) -> Tensor | None:
        """What is added to the attention's scores: ``[batch, head or 1, 1 or frame, frame]``."""
        if bias is None:
            return keys
        if self.gate is None:
            return bias[None] if keys is None else bias[None] + keys
        gate = self.gate(x)  # [batch, head, frame, 1]
        return gate * bias if keys is None else torch.addcmul(keys, gate, bias[None])


def is_known(module: TransformerSentenceEncoderLayer) -> bool:
    """Whether a module is a layer as :class:`Layer` computes it."""
    attention = getattr(module, "self_attn", None)
    if type(module).__name__ != "TransformerSentenceEncoderLayer" or attention is None:
        return False
    plain = type(module.fc1) is nn.Linear and attention.bias_k is None
    biased = all(
        getattr(attention, f"{part}_proj").bias is not None for part in ("q", "k", "v", "out")
    )
    odd = attention.add_zero_attn or getattr(attention, "skip_embed_dim_check", False)
    # "swish" is a class there and not a function: s3prl itself cannot run it.
    return plain and biased and not odd and not isinstance(module.activation_fn, type)


def _side_by_side(
    parts: list[nn.Linear], name: str, device: torch.device, dtype: torch.dtype, shared: bool
) -> Tensor:
    tensors = [getattr(part, name) for part in parts]
    together = torch.cat([tensor.detach().to(device, dtype) for tensor in tensors])
    if shared and tensors[0].device == device:
        begin = 0
        for tensor in tensors:
            tensor.data = together[begin : begin + len(tensor)]
            begin += len(tensor)
    return together


def _in_place(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """GELU in place, whose input nobody needs again; any other function as it is."""
    return torch.ops.aten.gelu_ if activation.__name__ == "gelu" else activation
