"""The student's forward pass over the modules of s3prl's ``DistillerModel``.

Waveforms go through the conv extractor, a linear projection, a convolution over time that encodes
positions, and the transformer layers (wav2vec 2.0, arXiv 2006.11477; DistilHuBERT, 2110.01900).
Each stage is one function of its modules and its input.

Training, the upstream, ONNX graphs and hidden-set packages all run these functions. A package
contains a copy of them, so they need nothing but torch 1.13 and Python 3.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class StudentOutput(NamedTuple):
    """The student's outputs.

    ``features``: conv features ``[batch, frame, channel]``. ``hidden_states``: the projected
    features and each transformer layer's output, ``[batch, frame, dim]`` each. ``last``: the
    encoder's output, which the heads read; it is the last hidden state unless the layers normalise
    first. ``mask``: ``[batch, frame]``, 1 where a frame is valid, 0 where it is padding.
    """

    features: Tensor
    hidden_states: list[Tensor]
    last: Tensor
    mask: Tensor


def extract(
    blocks: Iterable[Any], waves: Tensor, lengths: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Convolve waveforms.

    Args:
        blocks: each a convolution without padding, then dropout, normalisation, activation.
        waves, lengths: ``[batch, sample]`` and ``[batch]``.

    Returns:
        Features ``[batch, frame, channel]``, and how many frames of each are valid, ``[batch]``.
    """
    x = waves[:, None]  # [batch, channel, frame]
    for block in blocks:
        x = run(block, x, recompute=recompute)
        (kernel,), (stride,) = block[0].kernel_size, block[0].stride
        lengths = torch.div(lengths - kernel, stride, rounding_mode="trunc") + 1
    return x.transpose(1, 2), lengths


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x``, its gradient multiplied by ``scale`` on the way back."""
    if scale == 0:
        return x.detach()
    if scale == 1:
        return x
    return ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call, no-any-return]


class ScaleGradient(torch.autograd.Function):
    """See :func:`scale_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def encode(
    encoder: Any, layers: Iterable[Any], x: Tensor, padding: Tensor, recompute: bool
) -> tuple[list[Tensor], Tensor]:
    """Add positions, then run the transformer layers.

    Args:
        encoder: has ``pos_conv``, ``layer_norm``, ``layer_norm_first`` and ``dropout``.
        layers: the transformer layers to run.
        x: ``[batch, frame, dim]``, zero where ``padding [batch, frame]`` is true.

    Returns:
        The output of each layer and that of the encoder, ``[batch, frame, dim]`` each.
    """
    x = x + encoder.pos_conv(x.transpose(1, 2)).transpose(1, 2)
    if not encoder.layer_norm_first:
        x = encoder.layer_norm(x)
    x = F.dropout(x, encoder.dropout, encoder.training)

    states = []
    x = x.transpose(0, 1)  # [frame, batch, dim], as torch's attention has it
    for layer in layers:
        x = run(partial(transformer_layer, layer), x, padding, recompute=recompute)
        states.append(x.transpose(0, 1))
    x = x.transpose(0, 1)
    return states, encoder.layer_norm(x) if encoder.layer_norm_first else x


def transformer_layer(layer: Any, x: Tensor, padding: Tensor) -> Tensor:
    """Attention and feed-forward network, each normalised before or after its residual.

    ``x`` and the result are ``[frame, batch, dim]``, ``padding [batch, frame]``.
    """
    if layer.layer_norm_first:
        x = x + layer.dropout1(attention(layer.self_attn, layer.self_attn_layer_norm(x), padding))
        return x + feed_forward(layer, layer.final_layer_norm(x))
    x = layer.self_attn_layer_norm(x + layer.dropout1(attention(layer.self_attn, x, padding)))
    x = layer.final_layer_norm(x + feed_forward(layer, x))
    return x


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """``[..., dim]`` -> the same shape."""
    x = layer.dropout2(layer.activation_fn(layer.fc1(x)))
    x = layer.dropout3(layer.fc2(x))
    return x


def attention(module: Any, x: Tensor, padding: Tensor) -> Tensor:
    """Multi-head self-attention over the frames that are no padding.

    It calls the function that s3prl's models call, for the same numbers to the last bit and the
    same count by SUPERB's profiler. ``x [frame, batch, dim]``, ``padding [batch, frame]``.
    """
    query, key, value = module.q_proj, module.k_proj, module.v_proj
    mixed, _ = F.multi_head_attention_forward(
        x,
        x,
        x,
        embed_dim_to_check=x.shape[-1],
        num_heads=module.num_heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat((query.bias, key.bias, value.bias)),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=module.dropout_module.p,
        out_proj_weight=module.out_proj.weight,
        out_proj_bias=module.out_proj.bias,
        training=module.training,
        key_padding_mask=padding,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=query.weight,
        k_proj_weight=key.weight,
        v_proj_weight=value.weight,
    )
    return mixed


def run(stage: Callable[..., Tensor], *inputs: Tensor, recompute: bool) -> Tensor:
    """The output of a stage; with ``recompute``, its activations are not kept for the backward."""
    return checkpoint(stage, *inputs, use_reentrant=False) if recompute else stage(*inputs)


def student_forward(
    model: Any,
    waves: Tensor,
    lengths: Tensor,
    layers: Iterable[Any] | None = None,
    recompute: bool = False,
    extract: Callable[..., tuple[Tensor, Tensor]] = extract,
    encode: Callable[..., tuple[list[Tensor], Tensor]] = encode,
) -> StudentOutput:
    """Run a student.

    Args:
        model: s3prl's ``DistillerModel``, or modules of the same names.
        waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
        lengths: ``[batch]``, valid samples of each waveform, enough for one frame.
        layers: the transformer layers to run; all of the encoder's by default.
        recompute: keep only the inputs of conv blocks and transformer layers, and compute the rest
            again in the backward pass (activation checkpointing).
        extract, encode: other functions in the place of those above, with the same arguments.
    """
    features, frames = extract(model.feature_extractor.conv_layers, waves, lengths, recompute)
    features = scale_gradient(features, model.feature_grad_mult)
    padding = torch.arange(features.shape[1], device=waves.device) >= frames[:, None]

    projected = features if model.post_extract_proj is None else model.post_extract_proj(features)
    # not masked_fill, which changes the memory layout, in whose order dropout draws
    projected = torch.where(padding[..., None], projected.new_zeros(()), projected)

    layers = model.encoder.layers if layers is None else layers
    states, last = encode(model.encoder, layers, projected, padding, recompute)
    return StudentOutput(features, [projected, *states], last, (~padding).to(waves.dtype))
