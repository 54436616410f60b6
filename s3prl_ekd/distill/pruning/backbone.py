"""The modules of a copied student, in fairseq's layout, with its own sizes in each layer.

The conv extractor, the positional convolution and the layers are s3prl's classes; only the
attention is ours, because s3prl's insists on heads that together are as wide as the layer.
:mod:`~s3prl_ekd.distill.student_forward` runs them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from s3prl.upstream.wav2vec2.wav2vec2_model import (
    ConvFeatureExtractionModel,
    TransformerSentenceEncoderLayer,
    make_conv_pos,
)
from torch import Tensor, nn

from ..student_settings import PrunedSettings, StartDrop, Unit
from .gates import Gate, KeptLayerNorm


class PrunedBackbone(nn.Module):
    """HuBERT, wav2vec 2.0 or WavLM without masking and heads.

    Args:
        settings: sizes of the layers; gates are added for ``settings.gates``.
        start_drop: of the gates at the start.
    """

    hubert_states = True  # hidden states as in s3prl's HuBERT, see StudentOutput

    def __init__(self, settings: PrunedSettings, start_drop: StartDrop | None = None):
        super().__init__()
        self.normalize_waveforms = settings.normalize_waveforms
        self.feature_grad_mult = settings.feature_grad_mult
        self.input_dropout = settings.input_dropout
        width, channels = settings.encoder_embed_dim, settings.conv_layers[-1][0]
        self.feature_extractor = ConvFeatureExtractionModel(
            [*settings.conv_layers], 0.0, settings.extractor_mode, settings.conv_bias
        )
        self.layer_norm = nn.LayerNorm(channels)
        self.post_extract_proj = nn.Linear(channels, width)
        self.encoder = PrunedEncoder(settings)
        if settings.gates is not None:
            self._add_gates(settings, start_drop or StartDrop())
        if settings.feature_scale:
            self.feature_extractor.conv_layers[-1].add_module("scale", ChannelScale(channels))

    def _add_gates(self, settings: PrunedSettings, drop: StartDrop) -> None:
        gates = settings.gates
        assert gates is not None
        blocks: Any = self.feature_extractor.conv_layers
        layers: Any = self.encoder.layers
        for block in blocks if "conv" in gates.units else ():
            hard = block is blocks[-1] and gates.last_conv == "hard"
            gate = Gate(block[0].out_channels, drop.conv, trailing=1, at_least=1, hard=hard)
            if gates.norms == "kept" and settings.extractor_mode == "layer_norm":
                block[2][1] = KeptLayerNorm(block[2][1], gate)
            if gates.norms == "kept" and block is blocks[-1]:
                self.layer_norm = KeptLayerNorm(self.layer_norm, gate)
            block.add_module("gate", gate)
        for layer, heads, ffn in zip(layers, settings.heads, settings.ffn_dims, strict=True):
            if "heads" in gates.units and heads:
                layer.self_attn.gate = Gate(len(heads), drop.heads, trailing=2)
            if "attention" in gates.units and heads:
                layer.dropout1 = _gated(layer.dropout1, Gate(1, drop.attention))
            if "ffn" in gates.units and ffn:
                layer.dropout2 = _gated(layer.dropout2, Gate(ffn, drop.ffn))
            if "feed_forward" in gates.units and ffn:
                layer.dropout3 = _gated(layer.dropout3, Gate(1, drop.feed_forward))

    def gates(self) -> Iterator[tuple[Unit, int, Gate]]:
        """Kind, layer (counted from 0) and gates of each layer, in the order of the forward."""
        for i, block in enumerate(self.feature_extractor.conv_layers):
            if hasattr(block, "gate"):
                yield "conv", i, block.gate
        layers: Any = self.encoder.layers
        for i, layer in enumerate(layers):
            places: tuple[tuple[Unit, nn.Module], ...] = (
                ("heads", layer.self_attn),
                ("attention", layer.dropout1),
                ("ffn", layer.dropout2),
                ("feed_forward", layer.dropout3),
            )
            for unit, module in places:
                if isinstance(gate := getattr(module, "gate", None), Gate):
                    yield unit, i, gate

    def draw_gates(self) -> None:
        """Draw the gates of a forward."""
        for _, _, gate in self.gates():
            gate.draw()


class PrunedEncoder(nn.Module):
    """The positional convolution, the layers and a layer norm."""

    layerdrop = 0.0

    def __init__(self, settings: PrunedSettings):
        super().__init__()
        width = settings.encoder_embed_dim
        self.dropout = settings.dropout
        self.layer_norm_first = settings.layer_norm_first
        self.pos_conv = make_conv_pos(width, settings.conv_pos, settings.conv_pos_groups)
        self.layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList()
        for index, units in enumerate(settings.ffn_dims):
            layer = TransformerSentenceEncoderLayer(
                embedding_dim=width,
                ffn_embedding_dim=max(units, 1),
                num_attention_heads=1,
                dropout=settings.dropout,
                attention_dropout=settings.attention_dropout,
                activation_dropout=settings.activation_dropout,
                activation_fn=settings.activation_fn,
                layer_norm_first=settings.layer_norm_first,
            )
            layer.self_attn = PrunedAttention(settings, index)
            if not units:
                layer.fc1, layer.fc2 = nn.Identity(), Bias(width)
            # a norm in front of an empty module has no effect
            if settings.layer_norm_first and not settings.heads[index]:
                layer.self_attn_layer_norm = nn.Identity()
            if settings.layer_norm_first and not units:
                layer.final_layer_norm = nn.Identity()
            self.layers.append(layer)


class PrunedAttention(nn.Module):
    """The modules of a layer's attention; ``pruned_attention`` of ``student_forward`` runs them.

    Without heads only the bias of ``out_proj`` remains. WavLM's gated relative positions (arXiv
    2110.13900, section 3.1) have an embedding in the first layer.
    """

    def __init__(self, settings: PrunedSettings, layer: int):
        super().__init__()
        self.heads, self.head_dim = settings.heads[layer], settings.head_dim
        self.total_heads = settings.encoder_attention_heads
        width, inner = settings.encoder_embed_dim, len(self.heads) * self.head_dim
        self.dropout_module = nn.Dropout(settings.attention_dropout)
        self.gate: Gate | None = None
        self.max_distance = settings.max_distance
        if settings.position_buckets and layer == 0:
            self.relative_attention_bias = nn.Embedding(settings.position_buckets, self.total_heads)
        self.out_proj: nn.Module = nn.Linear(inner, width) if self.heads else Bias(width)
        if not self.heads:
            return
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        if settings.position_buckets:
            self.grep_linear = nn.Linear(self.head_dim, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.total_heads, 1, 1))


class Bias(nn.Module):
    """What remains of a linear layer without inputs: its bias."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> the bias, in the same shape."""
        return self.bias.expand_as(x)


class ChannelScale(nn.Module):
    """Fixed factors of conv channels, the gates of the last conv layer after the cut."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channel, frame]`` -> the same shape."""
        return x * self.weight[:, None]


def _gated(dropout: nn.Module, gate: Gate) -> nn.Sequential:
    return nn.Sequential(OrderedDict(dropout=dropout, gate=gate))
