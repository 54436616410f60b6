"""Transformer layers of a frozen teacher, with one product for q, k and v and fused attention.

Also the positional convolution and WavLM's gated relative position bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...distill.student_forward import needs_float32

if TYPE_CHECKING:  # WavLM has classes of the same names
    from s3prl.upstream.wav2vec2.wav2vec2_model import (
        MultiheadAttention,
        TransformerSentenceEncoderLayer,
    )

Norm = tuple[tuple[int, ...], Tensor, Tensor, float]  # shape, weight, bias, epsilon


@dataclass(frozen=True)
class Converter:
    """Converts weights to the device and dtype of the computation."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype)

    def linear(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        return self(layer.weight), self(layer.bias)

    def norm(self, layer: nn.LayerNorm) -> Norm:
        return layer.normalized_shape, self(layer.weight), self(layer.bias), layer.eps


class PositionalConv:
    """s3prl's ``encoder.pos_conv`` with the weight norm computed once."""

    def __init__(self, module: nn.Sequential, convert: Converter):
        conv: Any = module[0]
        pad: Any = module[1]
        if hasattr(conv, "weight_g"):
            # The module's forward recomputes the attribute `conv.weight` at each call. Until its
            # next call the attribute can share this tensor, which saves a copy; module.to() would
            # not move it.
            weight = torch._weight_norm(conv.weight_v, conv.weight_g, 2).detach()
            conv.weight = weight
        else:
            weight = conv.weight.detach()
        if needs_float32(conv, convert.device) and convert.dtype == torch.bfloat16:
            convert = Converter(convert.device, torch.float32)
        self.weight, self.bias = convert(weight), convert(conv.bias)
        self.padding, self.groups = conv.padding, conv.groups
        self.remove = pad.remove

    def __call__(self, x: Tensor) -> Tensor:
        """``[batch, frame, dim]`` -> the same shape."""
        y = x.transpose(1, 2).to(self.weight.dtype)
        y = F.conv1d(y, self.weight, self.bias, padding=self.padding, groups=self.groups)
        y = y[:, :, : y.shape[2] - self.remove].transpose(1, 2)
        return F.gelu(y).to(x.dtype)


class RelativeBias:
    """WavLM's position bias ``[head, frame, frame]``, cached by the number of frames.

    It depends only on the distance of two frames: s3prl's own function computes one row of
    distances, and the matrix is gathered from it.

    Args:
        attention: of the first layer, which has the embedding table.
    """

    cache_size = 4  # biases

    def __init__(self, attention: MultiheadAttention, convert: Converter):
        self.attention = attention
        self.device, self.dtype = convert.device, convert.dtype
        self._cache: dict[int, Tensor] = {}

    def __call__(self, frames: int) -> Tensor:
        if frames not in self._cache:
            while len(self._cache) >= self.cache_size:
                self._cache.pop(next(iter(self._cache)))
            self._cache[frames] = self._compute(frames)
        return self._cache[frames]

    def _compute(self, frames: int) -> Tensor:
        distances = torch.arange(1 - frames, frames)  # key minus query
        buckets = self.attention._relative_positions_bucket(distances, bidirectional=True)
        table = self.attention.relative_attention_bias.weight.detach().to(self.device)
        row = table[buckets.to(self.device)].t().to(self.dtype)  # [head, 2 * frames - 1]
        index = torch.arange(frames, device=self.device)
        return row[:, index[None] - index[:, None] + frames - 1].contiguous()


class BiasGate:
    """Gate of the position bias for each frame and head (WavLM, arXiv 2110.13900, section 3.1).

    s3prl sums four outputs of a linear layer for each gate. Here their weights are summed once.
    """

    def __init__(self, attention: MultiheadAttention, convert: Converter):
        linear = attention.grep_linear
        self.weight = convert(linear.weight.detach().view(2, 4, -1).sum(1))
        self.bias = convert(linear.bias.detach().view(2, 4).sum(1))
        self.scale = convert(attention.grep_a)  # [1, head, 1, 1]
        self.heads = attention.num_heads

    def __call__(self, x: Tensor) -> Tensor:
        """The attention's input ``[batch, frame, dim]`` -> gates ``[batch, head, frame, 1]``."""
        heads = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        gate_a, gate_b = torch.sigmoid(F.linear(heads, self.weight, self.bias)).split(1, -1)
        return gate_a * (gate_b * self.scale - 1.0) + 2.0


class FastLayer:
    """s3prl's ``TransformerSentenceEncoderLayer`` in eval mode.

    In float32 it shares the module's weights: those of q, k and v are concatenated once, and the
    module's parameters become views of the result. In half precision the weights are copies.

    Args:
        module: a layer of HuBERT, wav2vec 2.0 or WavLM; see :func:`supports_layer`.
    """

    def __init__(self, module: TransformerSentenceEncoderLayer, convert: Converter):
        attention = module.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = attention.num_heads
        self.pre_norm = module.layer_norm_first
        self.qkv = _concatenate([layer.weight for layer in projections], convert)
        self.qkv_bias = _concatenate([layer.bias for layer in projections], convert)
        self.out = convert.linear(attention.out_proj)
        self.up, self.down = convert.linear(module.fc1), convert.linear(module.fc2)
        self.attention_norm = convert.norm(module.self_attn_layer_norm)
        self.final_norm = convert.norm(module.final_layer_norm)
        is_gelu = module.activation_fn.__name__ == "gelu"
        self.activation = torch.ops.aten.gelu_ if is_gelu else module.activation_fn
        self.gate = BiasGate(attention, convert) if hasattr(attention, "grep_linear") else None

    def __call__(self, x: Tensor, bias: Tensor | None, key_mask: Tensor | None) -> Tensor:
        """Compute the layer's output ``[batch, frame, dim]``.

        Args:
            x: ``[batch, frame, dim]``; not modified.
            bias: WavLM's position bias ``[head, frame, frame]``, or None.
            key_mask: ``[batch, 1, 1, frame]``, 0 for valid frames and -inf for padding, added to
                the attention scores; None without padding.
        """
        y = F.layer_norm(x, *self.attention_norm) if self.pre_norm else x
        y = self._attend(y, self._attention_bias(y, bias, key_mask)).add_(x)
        if not self.pre_norm:
            y = F.layer_norm(y, *self.attention_norm)
        z = F.layer_norm(y, *self.final_norm) if self.pre_norm else y
        z = self.activation(F.linear(z, *self.up))
        y = F.linear(z, *self.down).add_(y)
        return y if self.pre_norm else F.layer_norm(y, *self.final_norm)

    def _attend(self, x: Tensor, attention_bias: Tensor | None) -> Tensor:
        batch, frames, dim = x.shape
        qkv = F.linear(x, self.qkv, self.qkv_bias).view(batch, frames, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [batch, head, frame, dim of a head]
        mixed = F.scaled_dot_product_attention(q, k, v, attention_bias)
        return F.linear(mixed.transpose(1, 2).reshape(batch, frames, dim), *self.out)

    def _attention_bias(
        self, x: Tensor, bias: Tensor | None, key_mask: Tensor | None
    ) -> Tensor | None:
        """Position bias plus key mask, ``[batch, head or 1, 1 or frame, frame]``, or None."""
        if bias is None:
            return key_mask
        if self.gate is None:
            return bias[None] if key_mask is None else bias[None] + key_mask
        gate = self.gate(x)  # [batch, head, frame, 1]
        return gate * bias if key_mask is None else torch.addcmul(key_mask, gate, bias[None])


def supports_layer(module: TransformerSentenceEncoderLayer) -> bool:
    """Whether :class:`FastLayer` can compute this module."""
    attention = getattr(module, "self_attn", None)
    if type(module).__name__ != "TransformerSentenceEncoderLayer" or attention is None:
        return False
    projections = [getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "out")]
    return (
        type(module.fc1) is nn.Linear
        # For "swish" s3prl has a class instead of a function, which s3prl itself cannot run.
        and not isinstance(module.activation_fn, type)
        and all(projection.bias is not None for projection in projections)
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not getattr(attention, "skip_embed_dim_check", False)
    )


def _concatenate(parameters: list[Tensor], convert: Converter) -> Tensor:
    """Concatenate parameters; in float32 on their own device, they become views of the result."""
    result = torch.cat([convert(parameter) for parameter in parameters])
    if convert.dtype == torch.float32 and parameters[0].device == convert.device:
        pieces = result.split([len(parameter) for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece
    return result
