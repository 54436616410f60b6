"""Transformer layers of a frozen teacher, with one product for q, k and v and fused attention.

Also the positional convolution and WavLM's gated relative position bias.
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
    """s3prl's ``encoder.pos_conv`` with the weight norm computed once.

    Args:
        module: ``Sequential(Conv1d with weight norm, SamePad, GELU)``.
        device, dtype: of the computation.
    """

    def __init__(self, module: nn.Sequential, device: torch.device, dtype: torch.dtype):
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
    """WavLM's position bias ``[head, frame, frame]``, cached by the number of frames.

    It depends only on the distance of two frames: s3prl's own function computes one row of
    distances, and the matrix is gathered from it.

    Args:
        attention: of the first layer, which has the embedding table.
        device, dtype: of the bias.
        cache_size: maximum number of cached biases.
    """

    def __init__(
        self,
        attention: MultiheadAttention,
        device: torch.device,
        dtype: torch.dtype,
        cache_size: int = 4,
    ):
        self.attention = attention
        self.device, self.dtype = device, dtype
        self.cache_size = cache_size
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

    Args:
        attention: s3prl's, with ``grep_linear`` and ``grep_a``.
        device, dtype: of the computation.
    """

    def __init__(self, attention: MultiheadAttention, device: torch.device, dtype: torch.dtype):
        linear = attention.grep_linear
        self.weight = linear.weight.detach().view(2, 4, -1).sum(1).to(device, dtype)
        self.bias = linear.bias.detach().view(2, 4).sum(1).to(device, dtype)
        self.scale = attention.grep_a.detach().to(device, dtype)  # [1, head, 1, 1]
        self.heads = attention.num_heads

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the gates ``[batch, head, frame, 1]`` from the attention's input.

        Args:
            x: ``[batch, frame, dim]``.
        """
        heads = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        gate_a, gate_b = torch.sigmoid(F.linear(heads, self.weight, self.bias)).split(1, -1)
        return gate_a * (gate_b * self.scale - 1.0) + 2.0


class FastLayer:
    """s3prl's ``TransformerSentenceEncoderLayer`` in eval mode.

    In float32 it shares the module's weights: those of q, k and v are concatenated once, and the
    module's parameters become views of the result. In half precision the weights are copies.

    Args:
        module: a layer of HuBERT, wav2vec 2.0 or WavLM; see :func:`supports_layer`.
        device, dtype: of the computation.
    """

    def __init__(
        self, module: TransformerSentenceEncoderLayer, device: torch.device, dtype: torch.dtype
    ):
        attention = module.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        shared = dtype == torch.float32

        def convert(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype)

        def norm(layer: nn.LayerNorm) -> Norm:
            return layer.normalized_shape, convert(layer.weight), convert(layer.bias), layer.eps

        self.heads = attention.num_heads
        self.pre_norm = module.layer_norm_first
        self.qkv = _concatenate(projections, "weight", device, dtype, shared)
        self.qkv_bias = _concatenate(projections, "bias", device, dtype, shared)
        self.out = convert(attention.out_proj.weight), convert(attention.out_proj.bias)
        self.up = convert(module.fc1.weight), convert(module.fc1.bias)
        self.down = convert(module.fc2.weight), convert(module.fc2.bias)
        self.attention_norm = norm(module.self_attn_layer_norm)
        self.final_norm = norm(module.final_layer_norm)
        self.activation = _in_place(module.activation_fn)
        gated = hasattr(attention, "grep_linear")
        self.gate = BiasGate(attention, device, dtype) if gated else None

    def __call__(self, x: Tensor, bias: Tensor | None, key_mask: Tensor | None) -> Tensor:
        """Compute the layer's output.

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
    usual = type(module.fc1) is nn.Linear and attention.bias_k is None
    has_biases = all(
        getattr(attention, f"{name}_proj").bias is not None for name in ("q", "k", "v", "out")
    )
    unusual = attention.add_zero_attn or getattr(attention, "skip_embed_dim_check", False)
    # For "swish" s3prl has a class instead of a function, which s3prl itself cannot run.
    return usual and has_biases and not unusual and not isinstance(module.activation_fn, type)


def _concatenate(
    projections: list[nn.Linear], name: str, device: torch.device, dtype: torch.dtype, shared: bool
) -> Tensor:
    """Concatenate a parameter of several layers; if ``shared``, they become views of the result."""
    tensors = [getattr(projection, name) for projection in projections]
    result = torch.cat([tensor.detach().to(device, dtype) for tensor in tensors])
    if shared and tensors[0].device == device:
        begin = 0
        for tensor in tensors:
            tensor.data = result[begin : begin + len(tensor)]
            begin += len(tensor)
    return result


def _in_place(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Replace GELU by its in-place version; return any other function unchanged."""
    return torch.ops.aten.gelu_ if activation.__name__ == "gelu" else activation
