"""The student's forward pass over the modules of s3prl's ``DistillerModel``, or those of a HuBERT
or WavLM, pruned or not (``pruning/backbone.py``).

The stages are the conv extractor, a linear projection, a convolution over time that encodes
positions, and the transformer layers (wav2vec 2.0, arXiv 2006.11477; DistilHuBERT, 2110.01900).
Each stage is a function of its modules and its input.

ONNX graphs and hidden-set packages run these functions; training and the upstream run them with
the extractor of ``conv_extractor.py`` in place of ``extract``. A package contains a copy of
them, so they need only torch 1.13 and Python 3.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# On CPUs with AMX, oneDNN (3.12, in torch 2.13) returns wrong values, with errors as large as the
# values, for some bfloat16 convolutions whose groups have fewer channels. Base models have 48.
FEWEST_CHANNELS = 16


class StudentOutput(NamedTuple):
    """The student's outputs.

    ``features``: conv features ``[batch, frame, channel]``. ``hidden_states``: the projected
    features and each transformer layer's output, ``[batch, frame, dim]`` each; of a copied student,
    as in s3prl's HuBERT, the input of the first layer, each layer's output, and in place of the
    last the encoder's output. ``last``: the encoder's output; with pre-norm layers it is
    normalised, and otherwise equals the last hidden state. ``mask``: ``[batch, frame]``, 1 where a
    frame is valid, 0 where it is padding.
    """

    features: Tensor
    hidden_states: list[Tensor]
    last: Tensor
    mask: Tensor


def extract(
    blocks: Iterable[Any],
    waves: Tensor,
    lengths: Tensor,
    recompute: bool,
    masked_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the conv extractor.

    Args:
        blocks: conv blocks, each an unpadded convolution, dropout, normalisation, activation.
        waves: ``[batch, sample]``.
        lengths: ``[batch]``, valid samples.
        recompute: see :func:`student_forward`.
        masked_norm: take the statistics of group norms over valid frames only.

    Returns:
        Features ``[batch, frame, channel]`` and the number of valid frames, ``[batch]``.
    """
    lengths = lengths.to(waves.device)
    x = waves[:, None]  # [batch, channel, frame]
    for block in blocks:
        lengths = conv_frames([block], lengths)
        stage = partial(masked_block, block, lengths=lengths) if masked_norm else block
        x = run(stage, x, recompute=recompute)
    return x.transpose(1, 2), lengths


def conv_frames(blocks: Iterable[Any], lengths: Tensor) -> Tensor:
    """Frames ``[batch]`` behind conv blocks for ``lengths [batch]`` in front of them."""
    for block in blocks:
        (kernel,), (stride,) = block[0].kernel_size, block[0].stride
        lengths = torch.div(lengths - kernel, stride, rounding_mode="trunc") + 1
    return lengths


def masked_block(block: Iterable[Any], x: Tensor, lengths: Tensor) -> Tensor:
    """Run a conv block ``[batch, channel, frame]`` with :func:`masked_group_norm` in place of a
    group norm; ``lengths [batch]``: valid frames of its output."""
    for module in block:
        if hasattr(module, "num_groups"):  # a group norm, with one channel in each group
            x = masked_group_norm(module, x, lengths)
        elif hasattr(module, "masked"):  # the group norm of an ONNX graph
            x = module.masked(x, lengths)
        else:
            x = module(x)
    return x


def masked_group_norm(norm: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """Normalise each channel of ``[batch, channel, frame]`` over its valid frames, ``lengths
    [batch]``.

    A group norm over a padded batch includes the padding, so hidden states depend on the length of
    the longest utterance. These statistics do not (*ours*); without padding both are equal.
    """
    valid = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
    exact = x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast, too
    valid = valid[:, None].to(exact.dtype)  # [batch, 1, frame]
    count = lengths[:, None, None].to(exact.dtype)
    centred = exact - (exact * valid).sum(2, keepdim=True) / count
    variance = (centred * valid).square().sum(2, keepdim=True) / count
    scale = norm.weight[:, None] * torch.rsqrt(variance + norm.eps)
    result: Tensor = centred * scale + norm.bias[:, None]
    return result.to(x.dtype)


def normalise(waves: Tensor, lengths: Tensor) -> Tensor:
    """Normalise each waveform of ``[batch, sample]`` to zero mean and unit variance over its valid
    samples, ``lengths [batch]``; padding becomes 0."""
    valid = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]  # [batch, sample]
    count = lengths[:, None].to(waves.dtype)
    centred = (waves - (waves * valid).sum(1, keepdim=True) / count) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-5)  # as torch's layer_norm, which s3prl calls


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Multiply the gradient that reaches ``x`` by ``scale``; 0 cuts the graph off."""
    if scale == 0:
        return x.detach()
    if scale != 1 and x.requires_grad:
        x.register_hook(lambda gradient: gradient * scale)
    return x


def needs_float32(conv: Any, device: torch.device) -> bool:
    """Whether a positional convolution may be wrong in bfloat16."""
    return device.type == "cpu" and conv.bias.numel() // conv.groups < FEWEST_CHANNELS


def positions(pos_conv: Any, x: Tensor) -> Tensor:
    """The positional encoding ``[batch, dim, frame]`` of ``x``, of the same shape."""
    if needs_float32(pos_conv[0], x.device):
        with torch.autocast("cpu", enabled=False):
            return pos_conv(x.to(pos_conv[0].bias.dtype))  # type: ignore[no-any-return]
    return pos_conv(x)  # type: ignore[no-any-return]


def encode(
    encoder: Any, layers: Iterable[Any], x: Tensor, padding: Tensor | None, recompute: bool
) -> tuple[list[Tensor], Tensor]:
    """Add the positional encoding and run the transformer layers.

    Args:
        encoder: has ``pos_conv``, ``layer_norm``, ``layer_norm_first`` and ``dropout``.
        layers: the transformer layers to run.
        x: ``[batch, frame, dim]``, zero where ``padding`` is true.
        padding: ``[batch, frame]``, true where a frame is padding; None: no frame is.
        recompute: see :func:`student_forward`.

    Returns:
        The input of the first layer and the output of each, ``[batch, frame, dim]``; and the output
        of the encoder.
    """
    x = x + positions(encoder.pos_conv, x.transpose(1, 2)).transpose(1, 2)
    if not encoder.layer_norm_first:
        x = encoder.layer_norm(x)
    x = F.dropout(x, encoder.dropout, encoder.training)

    states = [x]
    bias = position_bias(encoder.layers[0].self_attn, x.shape[1])  # of WavLM, else None
    x = x.transpose(0, 1)  # [frame, batch, dim], the layout of torch's attention
    for layer in layers:
        stage = partial(transformer_layer, layer, padding=padding, bias=bias)
        x = run(stage, x, recompute=recompute)
        states.append(x.transpose(0, 1))
    x = x.transpose(0, 1)
    return states, encoder.layer_norm(x) if encoder.layer_norm_first else x


def transformer_layer(
    layer: Any, x: Tensor, padding: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Attention and feed-forward network, each with a residual connection and a normalisation.

    ``x`` and the result are ``[frame, batch, dim]``; ``padding`` is ``[batch, frame]`` or None;
    ``bias`` is that of :func:`position_bias`.
    """
    if layer.layer_norm_first:
        mixed = attention(layer.self_attn, layer.self_attn_layer_norm(x), padding, bias)
        x = x + layer.dropout1(mixed)
        return x + feed_forward(layer, layer.final_layer_norm(x))
    mixed = attention(layer.self_attn, x, padding, bias)
    x = layer.self_attn_layer_norm(x + layer.dropout1(mixed))
    return layer.final_layer_norm(x + feed_forward(layer, x))  # type: ignore[no-any-return]


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """Apply the feed-forward network to ``[..., dim]``; the result has the same shape."""
    x = layer.dropout2(layer.activation_fn(layer.fc1(x)))
    return layer.dropout3(layer.fc2(x))  # type: ignore[no-any-return]


def attention(module: Any, x: Tensor, padding: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multi-head self-attention over the valid frames; without padding there is no mask, so that a
    GPU can use flash attention.

    Calls the same torch function as s3prl's models, so that the results are equal bit for bit and
    SUPERB's profiler counts the same MACs; for layers of a copied student see
    :func:`pruned_attention`. ``x``: ``[frame, batch, dim]``; ``padding``: ``[batch, frame]`` or
    None.
    """
    if hasattr(module, "heads"):
        return pruned_attention(module, x.transpose(0, 1), padding, bias).transpose(0, 1)
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


def pruned_attention(module: Any, x: Tensor, padding: Tensor | None, bias: Tensor | None) -> Tensor:
    """Self-attention of a layer that has any number of heads of one width.

    Args:
        module: has ``heads``, the places of the heads that remain, and their projections; without
            heads the result is the bias of the output projection.
        x: ``[batch, frame, dim]``, as the result.
        padding: ``[batch, frame]``, true where a frame is padding; None: no frame is.
        bias: WavLM's position bias ``[head, frame, frame]`` of all heads, or None.
    """
    if not module.heads:
        return module.out_proj(x)  # type: ignore[no-any-return]
    batch, frames, _ = x.shape
    shape = (batch, frames, len(module.heads), module.head_dim)
    query = module.q_proj(x).view(shape).transpose(1, 2)  # [batch, head, frame, dim of a head]
    key = module.k_proj(x).view(shape).transpose(1, 2)
    value = module.v_proj(x).view(shape).transpose(1, 2)
    mask = None if padding is None else ~padding[:, None, None]  # [batch, 1, 1, frame]
    if bias is not None:
        mask = position_gate(module, x) * pick(bias, 0, module.heads)
        if padding is not None:
            mask = mask.masked_fill(padding[:, None, None], float("-inf"))
    dropout = module.dropout_module.p if module.training else 0.0
    mixed = attend(query, key, value, mask, dropout)
    if module.gate is not None:
        mixed = module.gate(mixed)
    return module.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attend_in_steps(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """``F.scaled_dot_product_attention``, which torch 1.13 lacks.

    Args:
        query, key, value: ``[batch, head, frame, dim of a head]``, as the result.
        mask: added to the scores; as booleans, false where a key is left out; None: none is.
        dropout: probability of dropping an attention weight.
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ value


attend: Callable[..., Tensor] = getattr(F, "scaled_dot_product_attention", attend_in_steps)


def position_bias(module: Any, frames: int) -> Tensor | None:
    """WavLM's bias of attention scores by the distance from query to key, ``[head, frame, frame]``;
    None for a model without it.

    Near distances have a bucket each, far ones share buckets of logarithmic width (arXiv
    2110.13900, section 3.1). ``module``: the first layer's attention, which has the embedding.
    """
    if not hasattr(module, "relative_attention_bias"):
        return None
    embedding = module.relative_attention_bias.weight  # [bucket, head]
    frame = torch.arange(frames, device=embedding.device)
    distance = frame[None] - frame[:, None]  # [query, key]
    half = len(embedding) // 2  # buckets of each direction
    exact = half // 2
    far = torch.log(distance.abs().clamp(min=1).float() / exact)
    far = exact + (far / math.log(module.max_distance / exact) * (half - exact)).long()
    bucket = torch.where(distance.abs() < exact, distance.abs(), far.clamp(max=half - 1))
    return embedding[bucket + half * (distance > 0)].permute(2, 0, 1)  # type: ignore[no-any-return]


def position_gate(module: Any, x: Tensor) -> Tensor:
    """WavLM's gate of the position bias: ``[batch, frame, dim]`` -> ``[batch, head, frame, 1]``, of
    the heads that remain."""
    batch, frames, _ = x.shape
    parts = x.view(batch, frames, module.total_heads, module.head_dim)
    parts = pick(parts, 2, module.heads).transpose(1, 2)
    sums = module.grep_linear(parts).view(batch, len(module.heads), frames, 2, 4).sum(-1)
    update, reset = torch.sigmoid(sums).chunk(2, dim=-1)
    scale = pick(module.grep_a, 1, module.heads)
    return update * (reset * scale - 1.0) + 2.0


def pick(x: Tensor, dim: int, places: Iterable[int]) -> Tensor:
    """Entries of a dimension; indexing with a list would wait for a GPU."""
    return torch.stack([x.select(dim, place) for place in places], dim)


def run(stage: Callable[..., Tensor], *inputs: Tensor, recompute: bool) -> Tensor:
    """Run a stage; with ``recompute``, its activations are not stored for the backward pass."""
    return checkpoint(stage, *inputs, use_reentrant=False) if recompute else stage(*inputs)


def student_forward(
    model: Any,
    waves: Tensor,
    lengths: Tensor,
    layers: Iterable[Any] | None = None,
    recompute: bool = False,
    masked: tuple[Tensor, Tensor] | None = None,
    padded: bool = True,
    extract: Callable[..., tuple[Tensor, Tensor]] = extract,
    encode: Callable[..., tuple[list[Tensor], Tensor]] = encode,
) -> StudentOutput:
    """Run the student.

    Args:
        model: s3prl's ``DistillerModel``, or modules of the same names. A copied student also has
            a layer norm in front of the projection.
        waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
        lengths: ``[batch]``, valid samples of each waveform, enough for one frame; on the CPU, so
            that no call waits for a GPU, or on the device of the waveforms.
        layers: the transformer layers to run; None: all of the encoder's.
        recompute: activation checkpointing: store only the inputs of conv blocks and transformer
            layers and recompute the rest in the backward pass.
        masked: for masked prediction, bool ``[batch, frame]`` and the vector ``[dim]`` that
            replaces the projected features of these frames.
        padded: whether an utterance is padded; False spares the attention its mask.
        extract, encode: replacements for these two functions, for example compiled ones.
    """
    is_copy = getattr(model, "hubert_states", False)
    if is_copy and model.normalize_waveforms:
        waves = normalise(waves, lengths.to(waves.device, non_blocking=True))
    options = {"masked_norm": True} if getattr(model, "masked_norm", False) else {}
    blocks = model.feature_extractor.conv_layers
    features, frames = extract(blocks, waves, lengths, recompute, **options)
    features = scale_gradient(features, model.feature_grad_mult)
    frames = frames.to(waves.device, non_blocking=True)
    padding = torch.arange(features.shape[1], device=waves.device) >= frames[:, None]

    projected = model.layer_norm(features) if is_copy else features
    projected = projected if model.post_extract_proj is None else model.post_extract_proj(projected)
    if is_copy:
        projected = F.dropout(projected, model.input_dropout, model.training)
    # not masked_fill: it changes the memory layout, and dropout draws in the order of memory
    projected = torch.where(padding[..., None], projected.new_zeros(()), projected)
    if masked is not None:
        projected = torch.where(masked[0][..., None], masked[1].to(projected), projected)

    layers = model.encoder.layers if layers is None else layers
    states, last = encode(model.encoder, layers, projected, padding if padded else None, recompute)
    mask = (~padding).to(waves.dtype)
    if is_copy:
        return StudentOutput(features, [*states[:-1], last], last, mask)
    return StudentOutput(features, [projected, *states[1:]], last, mask)
