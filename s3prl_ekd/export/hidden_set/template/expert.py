"""A distilled speech student as an upstream for SUPERB and s3prl. Needs only torch (1.13 or later).

The model: waveforms at 16 kHz, a conv extractor (7 layers and one frame every 20 ms, unless the
config differs), a linear projection, a positional convolution and transformer layers. Hidden
states: the projected features and each layer's output, followed by the outputs of the prediction
heads from distillation if the package has them. See ``StudentOutput`` for those of a student that
is a pruned copy of HuBERT, wav2vec 2.0 or WavLM.

    >>> import torch
    >>> from expert import UpstreamExpert
    >>> expert = UpstreamExpert("model.pt").eval()
    >>> expert([torch.rand(16000), torch.rand(8000)])["hidden_states"][-1].shape
    torch.Size([2, 49, 768])

The architecture is that of wav2vec 2.0 and HuBERT, in the size of DistilHuBERT (arXiv 2110.01900),
or pruned to a size of its own in each layer (DPHuBERT, arXiv 2305.17651).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....distill.student_forward import student_forward

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


class UpstreamExpert(nn.Module):
    """The upstream that s3prl loads.

    Args:
        ckpt: path of ``model.pt``: tensors under "weights", settings as JSON under "config".
        upstream_feature_selection: not used; all hidden states are returned.
        kwargs: not used; s3prl passes ``model_config`` and ``refresh``.
    """

    def __init__(
        self,
        ckpt: str | Path = "./model.pt",
        upstream_feature_selection: str = "hidden_states",
        **kwargs: object,
    ):
        super().__init__()
        saved = torch.load(ckpt, map_location="cpu", weights_only=True)
        self.model = Student(SimpleNamespace(**json.loads(saved["config"])))
        self.model.load_state_dict(saved["weights"])

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return self.model.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """Run the student.

        Args:
            wavs: waveforms ``[sample]`` at 16 kHz, not padded, of any lengths.

        Returns:
            ``hidden_states``: a list of ``[batch, frame, dim]``.
        """
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        waves = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        min_samples = self.model.min_samples
        if waves.shape[1] < min_samples:  # too short for one frame: pad with silence
            waves = F.pad(waves, (0, min_samples - waves.shape[1]))
        return {"hidden_states": self.model(waves, lengths.clamp(min=min_samples))}


class Student(nn.Module):
    """The student with its prediction heads.

    Module names are those of s3prl's distiller and HuBERT, which ``student_forward`` uses.

    Settings in ``config``:
        conv_layers: (channels, kernel, stride) of each layer of the extractor.
        conv_norm: "default" normalises over time in the first layer only; "layer_norm" normalises
            in each layer.
        masked_norm: whether the norm over time is taken over valid frames only.
        conv_bias: whether the convolutions of the extractor have a bias.
        dim, attention_heads, activation, norm_first: of the transformer.
        ffn_dims: units of each layer's feed-forward network.
        conv_pos, conv_pos_groups: kernel and groups of the positional convolution.
        copy: of a copied student: ``normalize_waveforms``; ``feature_scale``, whether the conv
            features are scaled; ``heads``, the places of each layer's attention heads among
            ``attention_heads``; ``position_buckets`` and ``max_distance`` of WavLM's relative
            positions; ``input_dropout``. Otherwise null.
        heads: {name: {"layers", "parts"}} of the prediction heads; each output is split into
            ``parts`` (widths), and each part is a hidden state. Layerwise heads also
            have ``targets``, see :class:`LayerwiseHead`.
        head_kind: "split", "linear" or "layerwise".
        dropout, attention_dropout, activation_dropout, extractor_dropout: used in training only.
    """

    feature_grad_mult = 1.0  # no gradient scaling in the extractor

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        dim, heads = config.dim, config.heads
        channels = config.conv_layers[-1][0]
        self.feature_extractor = ConvExtractor(config)
        self.masked_norm = config.masked_norm
        self.hubert_states = config.copy is not None
        project = self.hubert_states or channels != dim
        self.post_extract_proj = nn.Linear(channels, dim) if project else None
        if self.hubert_states:
            self.normalize_waveforms = config.copy["normalize_waveforms"]
            self.input_dropout = config.copy["input_dropout"]
            self.layer_norm = nn.LayerNorm(channels)
        self.encoder = Encoder(config)
        self.layerwise = config.head_kind == "layerwise"
        # With norms first, the encoder's norm is used by heads and by copied students.
        if config.norm_first and not self.hubert_states and (self.layerwise or not heads):
            self.encoder.layer_norm = nn.Identity()
        self.head_parts = {name: list(head["parts"]) for name, head in heads.items()}
        self.heads = nn.ModuleDict(
            {name: HEADS[config.head_kind](dim, head) for name, head in heads.items()}
        )

    @property
    def stride(self) -> int:
        """Samples per frame."""
        return self.feature_extractor.stride

    @property
    def min_samples(self) -> int:
        """Samples of the shortest waveform that has one frame."""
        return self.feature_extractor.min_samples

    def forward(self, waves: Tensor, lengths: Tensor) -> list[Tensor]:
        """``[batch, sample]``, zero-padded, and ``[batch]`` -> list of ``[batch, frame, dim]``."""
        out = student_forward(self, waves, lengths)
        states = list(out.hidden_states)
        for name, head in self.heads.items():
            for prediction in head(out.hidden_states if self.layerwise else out.last):
                states.extend(prediction.split(self.head_parts[name], dim=-1))
        return states


class ConvExtractor(nn.Module):
    """Strided convolutions, each followed by dropout, a norm (if any) and GELU."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.shapes = [(kernel, stride) for _, kernel, stride in config.conv_layers]
        self.conv_layers = nn.ModuleList()
        in_channels = 1
        for i, (channels, kernel, stride) in enumerate(config.conv_layers):
            block = [
                nn.Conv1d(in_channels, channels, kernel, stride, bias=config.conv_bias),
                nn.Dropout(config.extractor_dropout),
            ]
            if config.conv_norm == "layer_norm":
                block.append(nn.Sequential(Transpose(), nn.LayerNorm(channels), Transpose()))
            elif i == 0:
                block.append(nn.GroupNorm(channels, channels))
            self.conv_layers.append(nn.Sequential(*block, nn.GELU()))
            in_channels = channels
        if config.copy and config.copy["feature_scale"]:
            self.conv_layers[-1].add_module("scale", ChannelScale(in_channels))

    @property
    def stride(self) -> int:
        stride = 1
        for _, step in self.shapes:
            stride *= step
        return stride

    @property
    def min_samples(self) -> int:
        samples = 1
        for kernel, stride in reversed(self.shapes):
            samples = (samples - 1) * stride + kernel
        return samples


class ChannelScale(nn.Module):
    """Fixed factors of the last conv layer's channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channel, frame]`` -> the same shape."""
        return x * self.weight[:, None]


class Transpose(nn.Module):
    """``[batch, channel, frame]`` -> ``[batch, frame, channel]``, and back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Encoder(nn.Module):
    """The transformer: a positional convolution, a norm and layers."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        positions = PositionalConv(config.dim, config.conv_pos, config.conv_pos_groups)
        self.pos_conv = nn.Sequential(positions, nn.GELU())
        self.layer_norm: nn.Module = nn.LayerNorm(config.dim)
        self.layer_norm_first = config.norm_first
        self.dropout = config.dropout
        layers = range(len(config.ffn_dims))
        self.layers = nn.ModuleList(TransformerLayer(config, layer) for layer in layers)


class PositionalConv(nn.Module):
    """A wide grouped convolution over time that encodes relative positions (wav2vec 2.0).

    Weight norm: its weight is ``weight_v``, normalised per kernel position, times ``weight_g``.
    """

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, dim, frame]`` -> the same shape."""
        padding = self.weight_v.shape[-1] // 2
        # As in torch's weight_norm wrappers, whose parameter names depend on the torch version.
        weight = torch._weight_norm(self.weight_v, self.weight_g, 2)
        out = F.conv1d(x, weight, self.bias, padding=padding, groups=self.groups)
        return out[:, :, : x.shape[2]]


class TransformerLayer(nn.Module):
    """Modules used by ``transformer_layer``.

    Of a feed-forward network without units only a bias is left, and a norm in front of a module
    without heads or units is left out.
    """

    def __init__(self, config: SimpleNamespace, layer: int):
        super().__init__()
        dim, units = config.dim, config.ffn_dims[layer]
        self.layer_norm_first = config.norm_first
        self.activation_fn = ACTIVATIONS[config.activation]
        self.self_attn = PrunedAttention(config, layer) if config.copy else SelfAttention(config)
        normed = not config.norm_first or not config.copy or config.copy["heads"][layer]
        self.self_attn_layer_norm = nn.LayerNorm(dim) if normed else nn.Identity()
        self.fc1 = nn.Linear(dim, units) if units else nn.Identity()
        self.fc2 = nn.Linear(units, dim) if units else Bias(dim)
        normed = not config.norm_first or units
        self.final_layer_norm = nn.LayerNorm(dim) if normed else nn.Identity()
        self.dropout1 = nn.Dropout(config.dropout)
        self.dropout2 = nn.Dropout(config.activation_dropout)
        self.dropout3 = nn.Dropout(config.dropout)


class Bias(nn.Module):
    """A linear layer without inputs: only its bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` -> the bias, in the same shape."""
        return self.bias.expand_as(x)


class SelfAttention(nn.Module):
    """Modules used by ``attention``."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        dim = config.dim
        self.num_heads = config.attention_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout_module = nn.Dropout(config.attention_dropout)


class PrunedAttention(nn.Module):
    """Modules used by ``pruned_attention``, with any number of heads; without heads, only a bias.

    With WavLM's relative positions, the first layer has the embedding that all layers use.
    """

    gate = None  # of a student that is being pruned

    def __init__(self, config: SimpleNamespace, layer: int):
        super().__init__()
        self.heads = config.copy["heads"][layer]
        self.total_heads = config.attention_heads
        self.head_dim = config.dim // self.total_heads
        self.max_distance = config.copy["max_distance"]
        dim, inner = config.dim, len(self.heads) * self.head_dim
        buckets = config.copy["position_buckets"]
        self.dropout_module = nn.Dropout(config.attention_dropout)
        self.out_proj = nn.Linear(inner, dim) if self.heads else Bias(dim)
        if buckets and layer == 0:
            self.relative_attention_bias = nn.Embedding(buckets, self.total_heads)
        if self.heads:
            self.q_proj = nn.Linear(dim, inner)
            self.k_proj = nn.Linear(dim, inner)
            self.v_proj = nn.Linear(dim, inner)
        if self.heads and buckets:
            self.grep_linear = nn.Linear(self.head_dim, 8)
            self.grep_a = nn.Parameter(torch.empty(1, self.total_heads, 1, 1))


class SplitHead(nn.Module):
    """Predicts several teacher layers: a linear layer and GELU, then one linear layer for each."""

    def __init__(self, dim: int, config: dict[str, Any]):
        super().__init__()
        layers, width = config["layers"], sum(config["parts"])
        self.hidden = nn.Linear(dim, layers * dim)
        self.weight = nn.Parameter(torch.empty(layers, dim, width))
        self.bias = nn.Parameter(torch.empty(layers, 1, 1, width))

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[batch, frame, dim]`` -> a list of ``[batch, frame, width]``, one per layer."""
        hidden = F.gelu(self.hidden(x)).unflatten(-1, (len(self.weight), -1))
        out = torch.einsum("btld,ldw->lbtw", hidden, self.weight) + self.bias
        return list(out.unbind(0))


class LinearHead(nn.Module):
    """Predicts several teacher layers, each by one linear layer."""

    def __init__(self, dim: int, config: dict[str, Any]):
        super().__init__()
        self.layers = config["layers"]
        self.out = nn.Linear(dim, self.layers * sum(config["parts"]))

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[batch, frame, dim]`` -> a list of ``[batch, frame, width]``, one per layer."""
        return list(self.out(x).chunk(self.layers, dim=-1))


class LayerwiseHead(nn.Module):
    """Predicts each teacher layer by a linear layer from hidden states of the student.

    ``config["targets"]``: of each teacher layer the name of its linear layer, which several may
    share, and the hidden states whose mean is its input.
    """

    def __init__(self, dim: int, config: dict[str, Any]):
        super().__init__()
        self.targets, width = config["targets"], sum(config["parts"])
        self.projections = nn.ModuleDict({name: nn.Linear(dim, width) for name, _ in self.targets})

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        """Hidden states ``[batch, frame, dim]`` -> a list of ``[batch, frame, width]``."""
        return [
            self.projections[name](torch.stack([states[i] for i in layers]).mean(0))
            for name, layers in self.targets
        ]


HEADS = {"split": SplitHead, "linear": LinearHead, "layerwise": LayerwiseHead}
