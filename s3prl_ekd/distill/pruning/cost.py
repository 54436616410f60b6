"""The cost of a student by the widths of its layers: parameters, or multiply-accumulates (MACs).

With the expected widths of a student with gates the cost is differentiable in the gates (DPHuBERT,
arXiv 2305.17651, section 2.3, and its code). At whole numbers it is exactly the number of
parameters, or of MACs in matrix products and convolutions, of the student that is cut to them, with
two exceptions: if a layer loses all heads, WavLM's position gate counts as if it stayed, and so
does a pre-norm layer's norm in front of a module that loses all units.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..student_settings import PrunedSettings, Unit
from .backbone import PrunedBackbone

Width = Tensor | float


@dataclass
class Widths:
    """Widths of the layers: numbers, or expectations as scalars with a gradient.

    ``conv``: channels of each conv layer. ``heads``, ``ffn``: attention heads and feed-forward
    units of each transformer layer. ``attention``, ``feed_forward``: 1 for each module that is
    kept.
    """

    conv: list[Width]
    heads: list[Width]
    ffn: list[Width]
    attention: list[Width]
    feed_forward: list[Width]

    def of(self, unit: Unit) -> list[Width]:
        widths: list[Width] = getattr(self, unit)
        return widths


def full_widths(settings: PrunedSettings) -> Widths:
    """The widths of a student whose gates are all open."""
    return Widths(
        conv=[layer[0] for layer in settings.conv_layers],
        heads=[len(places) for places in settings.heads],
        ffn=[*settings.ffn_dims],
        attention=[1.0] * settings.encoder_layers,
        feed_forward=[1.0] * settings.encoder_layers,
    )


def expected_widths(settings: PrunedSettings, backbone: PrunedBackbone) -> Widths:
    """The expected widths of a student with gates, differentiable."""
    widths = full_widths(settings)
    for unit, layer, gate in backbone.gates():
        widths.of(unit)[layer] = gate.expected_open()
    return widths


def smallest_widths(settings: PrunedSettings, backbone: PrunedBackbone) -> Widths:
    """The widths of a student with as many gates closed as can be."""
    widths = full_widths(settings)
    for unit, layer, gate in backbone.gates():
        widths.of(unit)[layer] = gate.at_least
    return widths


def parameters(settings: PrunedSettings, widths: Widths) -> Width:
    """Number of parameters of a student, without heads.

    With ``layer_norm_first``, the norm in front of a layer's attention or feed-forward network is
    removed with the module, but counts as long as the student has gates.
    """
    width, head = settings.encoder_embed_dim, settings.head_dim
    total: Width = 0.0
    before: Width = 1.0
    for i, (channels, (_, kernel, _)) in enumerate(
        zip(widths.conv, settings.conv_layers, strict=True)
    ):
        normed = settings.extractor_mode == "layer_norm" or i == 0
        total = total + before * channels * kernel + channels * (settings.conv_bias + 2 * normed)
        before = channels
    total = total + before * (2 + settings.feature_scale)  # layer norm, scale
    total = total + before * width + width  # projection
    total = total + width * (width // settings.conv_pos_groups) * settings.conv_pos
    total = total + settings.conv_pos + width + 2 * width  # weight norm, bias, layer norm
    total = total + settings.position_buckets * settings.encoder_attention_heads
    positions = (
        8 * (head + 1) + settings.encoder_attention_heads if settings.position_buckets else 0
    )
    for layer in range(settings.encoder_layers):
        heads, ffn = widths.heads[layer], widths.ffn[layer]
        attention = 3 * (width + 1) * heads * head + heads * head * width
        feed_forward = (2 * width + 1) * ffn
        total = total + widths.attention[layer] * attention
        total = total + widths.feed_forward[layer] * feed_forward
        # biases of the output projections, gate of WavLM's positions, layer norms
        total = total + 2 * width + (positions if settings.heads[layer] else 0)
        modules = bool(settings.heads[layer]) + bool(settings.ffn_dims[layer])
        total = total + 2 * width * (modules if settings.layer_norm_first else 2)
    return total


def macs(settings: PrunedSettings, widths: Widths, samples: int) -> Width:
    """MACs of matrix products and convolutions for one utterance of ``samples`` at 16 kHz."""
    width, head = settings.encoder_embed_dim, settings.head_dim
    total: Width = 0.0
    before: Width = 1.0
    frames = samples
    for channels, (_, kernel, stride) in zip(widths.conv, settings.conv_layers, strict=True):
        frames = (frames - kernel) // stride + 1
        total = total + before * channels * (kernel * frames)
        before = channels
    total = total + before * (width * frames)
    # an even kernel gives one frame more, which is dropped
    positions = frames + 1 - settings.conv_pos % 2
    total = total + width * (width // settings.conv_pos_groups) * settings.conv_pos * positions
    gate = 8 * frames if settings.position_buckets else 0  # of WavLM's positions, for each head
    for layer in range(settings.encoder_layers):
        attention = widths.heads[layer] * head * (4 * width * frames + 2 * frames**2 + gate)
        feed_forward = widths.ffn[layer] * (2 * width * frames)
        total = total + widths.attention[layer] * attention
        total = total + widths.feed_forward[layer] * feed_forward
    return total


def as_number(cost: Width) -> float:
    """A cost as a number."""
    return float(cost.detach()) if isinstance(cost, Tensor) else float(cost)
