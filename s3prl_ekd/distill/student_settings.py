"""The student's settings: its size and regularisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from .conv_layers import DEFAULT, ConvLayers, parse_conv_layers, receptive_field, stride_of
from .ranges import check_range

# Upper limits of a student's size. HuBERT X-Large, a teacher, has 48 layers and 960 M parameters.
MAX_LAYERS, MAX_PARAMETERS = 256, 1_000_000_000


@dataclass(frozen=True)
class StudentSettings:
    """Size and regularisation of the student; keys and meaning as in s3prl's ``DistillerConfig``.

    The defaults are DistilHuBERT's (inferred): 7 conv layers and 2 transformer layers of width 768,
    23,491,200 parameters without heads.
    """

    extractor_mode: Literal["default", "layer_norm"] = "default"
    """Normalisation in the conv extractor: group norm after the first layer, or layer norm after
    each."""

    extractor_conv_feature_layers: str = DEFAULT
    """Conv layers as (channels, kernel, stride), in fairseq's notation."""

    extractor_dropout: float = 0.0
    """Dropout after each conv layer."""

    feature_grad_mult: float = 0.1
    """Factor on the gradient that reaches the conv extractor; 0 freezes it."""

    conv_pos: int = 128
    """Kernel of the convolution that encodes positions, in frames."""

    conv_pos_groups: int = 16
    """Groups of that convolution."""

    encoder_layers: int = 2
    """Transformer layers."""

    encoder_embed_dim: int = 768
    """Width of the transformer layers."""

    encoder_ffn_embed_dim: int = 3072
    """Width of their feed-forward networks."""

    encoder_attention_heads: int = 12
    """Attention heads of each layer."""

    activation_fn: Literal["gelu", "relu"] = "gelu"
    """Activation of the feed-forward networks."""

    layer_norm_first: bool = False
    """Normalise before attention and feed-forward network (pre-norm) instead of after."""

    dropout: float = 0.1
    """Dropout after attention and feed-forward network."""

    attention_dropout: float = 0.1
    """Dropout of the attention weights."""

    activation_dropout: float = 0.1
    """Dropout after the activation of the feed-forward network."""

    encoder_layerdrop: float = 0.0
    """Probability of skipping a transformer layer in training."""

    def __post_init__(self) -> None:
        try:
            parse_conv_layers(self.extractor_conv_feature_layers)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        check_range(self, 1, math.inf, "conv_pos", "conv_pos_groups", "encoder_layers")
        check_range(self, 1, math.inf, "encoder_embed_dim", "encoder_ffn_embed_dim")
        check_range(self, 1, math.inf, "encoder_attention_heads")
        check_range(self, 0, math.inf, "feature_grad_mult")
        for name, value in vars(self).items():
            if name.endswith(("dropout", "layerdrop")) and not 0 <= value < 1:
                raise ValueError(f"{name} must be 0 or more and below 1, got {value}")
        for name in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, name):
                raise ValueError(
                    f"encoder_embed_dim ({self.encoder_embed_dim}) must be a multiple of "
                    f"{name} ({getattr(self, name)})"
                )

    @property
    def conv_layers(self) -> ConvLayers:
        """``(channels, kernel, stride)`` of each conv layer."""
        return parse_conv_layers(self.extractor_conv_feature_layers)

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return stride_of(self.conv_layers)

    @property
    def min_samples(self) -> int:
        """The shortest waveform, in samples, that gives a frame."""
        return receptive_field(self.conv_layers)


def matrix_parameters(settings: StudentSettings) -> int:
    """Number of parameters in convolutions and matrices, without biases and norms."""
    width, inner = settings.encoder_embed_dim, settings.encoder_ffn_embed_dim
    total, before = 0, 1
    for channels, kernel, _ in settings.conv_layers:
        total += before * channels * kernel
        before = channels
    total += before * width if before != width else 0  # the feature projection
    total += width * (width // settings.conv_pos_groups) * settings.conv_pos
    return total + settings.encoder_layers * (4 * width * width + 2 * width * inner)


def check_size(settings: StudentSettings) -> None:
    """Reject a student of more layers or parameters than ``MAX_LAYERS`` and ``MAX_PARAMETERS``.

    A typing mistake in a YAML file would otherwise allocate terabytes.

    Raises:
        ValueError: the student is larger.
    """
    if settings.encoder_layers > MAX_LAYERS:
        raise ValueError(
            f"encoder_layers must be at most {MAX_LAYERS}, got {settings.encoder_layers}"
        )
    count = matrix_parameters(settings)
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"a student of this size has {count:,} parameters; at most {MAX_PARAMETERS:,} are "
            "allowed"
        )
