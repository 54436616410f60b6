"""A distilled speech student as an upstream for SUPERB and s3prl. Needs torch (1.13 or later).

Waveforms at 16 kHz go through a convolutional extractor (7 layers, one frame every 20 ms, unless
config says otherwise), a linear projection, a convolution for the position, and a few transformer
layers. The hidden states are the projected features and each layer's output; behind them come, if
the package has them, the outputs of the prediction heads that the student was distilled with.

    >>> from expert import UpstreamExpert
    >>> expert = UpstreamExpert("model.pt").eval()
    >>> expert([torch.rand(16000), torch.rand(8000)])["hidden_states"][-1].shape
    torch.Size([2, 49, 768])

The architecture is that of wav2vec 2.0 and HuBERT, in the size of DistilHuBERT (arXiv 2110.01900).
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


class UpstreamExpert(nn.Module):
    """
    Args:
        ckpt: path of ``model.pt``: tensors under "weights", the settings as JSON under "config".
        upstream_feature_selection: not used; all hidden states are returned.
        kwargs: not used; s3prl passes ``model_config`` and ``refresh``.
    """

    def __init__(self, ckpt="./model.pt", upstream_feature_selection="hidden_states", **kwargs):
        super().__init__()
        saved = torch.load(ckpt, map_location="cpu", weights_only=True)
        self.model = Student(**json.loads(saved["config"]))
        self.model.load_state_dict(saved["weights"])

    def get_downsample_rates(self, key: str) -> int:
        """Samples from one frame to the next."""
        return self.model.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """
        Args:
            wavs: waveforms ``[sample]`` at 16 kHz, not padded, of any lengths.

        Returns:
            ``hidden_states``: a list of ``[batch, frame, dim]``.
        """
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        waves = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        shortest = self.model.min_samples
        if waves.shape[1] < shortest:  # too short for one frame: silence makes it one
            waves = F.pad(waves, (0, shortest - waves.shape[1]))
        return {"hidden_states": self.model(waves, lengths.clamp(min=shortest))}


class Student(nn.Module):
    """
    Args:
        conv_layers: (channels, kernel, stride) of each layer of the extractor.
        conv_norm: "default" normalises in the first layer only, over time; "layer_norm" in each.
        dim, ffn_dim, attention_heads, layers, activation, norm_first: of the transformer.
        conv_pos, conv_pos_groups: kernel and groups of the positional convolution.
        heads: {name: {"layers", "parts"}} of the prediction heads; ``parts`` are the widths into
            which an output is cut, so that each piece is a hidden state.
        head_kind: "split" or "linear".
        dropout, attention_dropout, activation_dropout, extractor_dropout: while training only.
    """

    def __init__(
        self,
        conv_layers,
        conv_norm,
        dim,
        ffn_dim,
        attention_heads,
        layers,
        activation,
        norm_first,
        conv_pos,
        conv_pos_groups,
        heads,
        head_kind,
        dropout,
        attention_dropout,
        activation_dropout,
        extractor_dropout,
    ):
        super().__init__()
        self.extractor = ConvExtractor(conv_layers, conv_norm, extractor_dropout)
        channels = self.extractor.channels
        self.projection = nn.Linear(channels, dim) if channels != dim else nn.Identity()
        self.position = PositionalConv(dim, conv_pos, conv_pos_groups)
        self.norm_first = norm_first
        # With norm_first only the heads read what this layer gives.
        self.norm = nn.LayerNorm(dim) if heads or not norm_first else None
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(
                dim,
                ffn_dim,
                attention_heads,
                activation,
                norm_first,
                dropout,
                attention_dropout,
                activation_dropout,
            )
            for _ in range(layers)
        )
        self.head_parts = {name: list(head["parts"]) for name, head in heads.items()}
        kinds = {"split": SplitHead, "linear": LinearHead}
        self.heads = nn.ModuleDict(
            {
                name: kinds[head_kind](dim, head["layers"], sum(head["parts"]))
                for name, head in heads.items()
            }
        )

    @property
    def stride(self) -> int:
        return self.extractor.stride

    @property
    def min_samples(self) -> int:
        return self.extractor.min_samples

    def forward(self, waves: Tensor, lengths: Tensor) -> list[Tensor]:
        """``[batch, sample]``, zero-padded, and ``[batch]`` -> list of ``[batch, frame, dim]``."""
        features = self.extractor(waves)  # [batch, frame, channel]
        frames = torch.arange(features.shape[1], device=waves.device)
        padding = frames >= self.extractor.frames(lengths)[:, None]  # [batch, frame]

        hidden = self.projection(features).masked_fill(padding[:, :, None], 0.0)
        states = [hidden]
        hidden = hidden + self.position(hidden)
        if not self.norm_first:
            hidden = self.norm(hidden)
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, padding)
            states.append(hidden)

        if self.heads and self.norm_first:
            hidden = self.norm(hidden)
        for name, head in self.heads.items():
            for prediction in head(hidden):
                states.extend(prediction.split(self.head_parts[name], dim=-1))
        return states


class ConvExtractor(nn.Module):
    """Strided convolutions without biases: ``[batch, sample]`` -> ``[batch, frame, channel]``."""

    def __init__(self, conv_layers, norm: str, dropout: float):
        super().__init__()
        self.shapes = [(kernel, stride) for _, kernel, stride in conv_layers]
        self.blocks = nn.ModuleList()
        self.channels = 1
        for i, (channels, kernel, stride) in enumerate(conv_layers):
            conv = nn.Conv1d(self.channels, channels, kernel, stride, bias=False)
            if norm == "layer_norm":
                normalise = ChannelNorm(channels)
            else:
                normalise = nn.GroupNorm(channels, channels) if i == 0 else nn.Identity()
            self.blocks.append(nn.Sequential(conv, nn.Dropout(dropout), normalise, nn.GELU()))
            self.channels = channels

    @property
    def stride(self) -> int:
        stride = 1
        for _, step in self.shapes:
            stride *= step
        return stride

    @property
    def min_samples(self) -> int:
        """The shortest waveform that gives a frame."""
        samples = 1
        for kernel, stride in reversed(self.shapes):
            samples = (samples - 1) * stride + kernel
        return samples

    def frames(self, samples: Tensor) -> Tensor:
        """How many frames come of so many samples; both ``[batch]``."""
        for kernel, stride in self.shapes:
            samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
        return samples

    def forward(self, waves: Tensor) -> Tensor:
        x = waves[:, None]
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of ``[batch, channel, frame]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class PositionalConv(nn.Module):
    """A wide grouped convolution over time that tells a frame where it stands.

    Its weight is ``direction``, normalised for each place in the kernel, times ``magnitude``.
    """

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups = groups
        self.direction = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.magnitude = nn.Parameter(torch.empty(1, 1, kernel))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, frame, dim]`` -> the same shape."""
        kernel = self.direction.shape[-1]
        # What torch's two weight_norm wrappers compute; they change names and warn by version.
        weight = torch._weight_norm(self.direction, self.magnitude, 2)
        out = F.conv1d(
            x.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups
        )
        return F.gelu(out[:, :, : x.shape[1]]).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward network, each normalised before or after its residual."""

    def __init__(
        self,
        dim,
        ffn_dim,
        attention_heads,
        activation,
        norm_first,
        dropout,
        attention_dropout,
        activation_dropout,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.activation = ACTIVATIONS[activation]
        self.attention = SelfAttention(dim, attention_heads, attention_dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.activation_dropout = nn.Dropout(activation_dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        x = self.activation_dropout(self.activation(self.ffn_in(x)))
        return self.dropout(self.ffn_out(x))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), padding))
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, padding)))
        return self.ffn_norm(x + self.feed_forward(x))


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention that looks at no padded frame.

    It calls the function that s3prl's own models call, for the same numbers to the last bit
    and the same count by SUPERB's profiler.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """``[batch, frame, dim]`` and ``[batch, frame]``, true where padded."""
        x = x.transpose(0, 1)
        mixed, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat((self.query.bias, self.key.bias, self.value.bias)),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=self.dropout,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            training=self.training,
            key_padding_mask=padding,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.query.weight,
            k_proj_weight=self.key.weight,
            v_proj_weight=self.value.weight,
        )
        return mixed.transpose(0, 1)


class SplitHead(nn.Module):
    """Predicts several layers of a teacher: a linear layer and GELU, then one layer for each."""

    def __init__(self, dim: int, layers: int, width: int):
        super().__init__()
        self.hidden = nn.Linear(dim, layers * dim)
        self.weight = nn.Parameter(torch.empty(layers, dim, width))
        self.bias = nn.Parameter(torch.empty(layers, 1, 1, width))

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[batch, frame, dim]`` -> for each layer ``[batch, frame, width]``."""
        hidden = F.gelu(self.hidden(x)).unflatten(-1, (len(self.weight), -1))
        out = torch.einsum("btld,ldw->lbtw", hidden, self.weight) + self.bias
        return list(out.unbind(0))


class LinearHead(nn.Module):
    """Predicts several layers of a teacher, each by one linear layer."""

    def __init__(self, dim: int, layers: int, width: int):
        super().__init__()
        self.layers = layers
        self.out = nn.Linear(dim, layers * width)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[batch, frame, dim]`` -> for each layer ``[batch, frame, width]``."""
        return list(self.out(x).chunk(self.layers, dim=-1))
