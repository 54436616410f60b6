"""The student's settings: its size and regularisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, get_args

from ..errors import ConfigError
from .conv_layers import (
    DEFAULT,
    ConvLayers,
    conv_layers_text,
    parse_conv_layers,
    receptive_field,
    stride_of,
)
from .ranges import check_range

if TYPE_CHECKING:
    from torch import Tensor

Samples = TypeVar("Samples", int, "Tensor")

# Upper limits of a student's size. HuBERT X-Large, a teacher, has 48 layers and 960 M parameters.
MAX_LAYERS, MAX_PARAMETERS = 256, 1_000_000_000

Unit = Literal["conv", "heads", "ffn", "attention", "feed_forward"]
UNITS = get_args(Unit)


def check_dropout(settings: object) -> None:
    """Raise ValueError for a dropout probability outside 0 to below 1."""
    for name, value in vars(settings).items():
        if name.endswith(("dropout", "layerdrop")) and not 0 <= value < 1:
            raise ValueError(f"{name} must be 0 or more and below 1, got {value}")


def check_multiples(settings: StudentSettings | PrunedSettings) -> None:
    """Raise ValueError if the width is not a multiple of the heads and of the groups."""
    for name in ("encoder_attention_heads", "conv_pos_groups"):
        if settings.encoder_embed_dim % getattr(settings, name):
            raise ValueError(
                f"encoder_embed_dim ({settings.encoder_embed_dim}) must be a multiple of "
                f"{name} ({getattr(settings, name)})"
            )


@dataclass(frozen=True)
class MaskSettings:
    """Masked spans of the student's projected conv features (HuBERT, arXiv 2106.07447, section
    III-B). A learned vector replaces the masked frames. ``unit_loss`` is computed on them, and the
    distillation loss on the other frames (ours)."""

    length: int = 10
    """Frames of a span (HuBERT)."""

    share: float = 0.8
    """Sum of the spans' lengths, as a share of the utterance (HuBERT). Spans overlap: with 0.8 and
    a length of 10, 57 % of the frames of a long utterance are masked."""

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "length")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")


class ConvInput:
    """What follows from the conv layers of a student."""

    if TYPE_CHECKING:  # at run time it would be the default of a dataclass's field

        @property
        def conv_layers(self) -> ConvLayers: ...

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return stride_of(self.conv_layers)

    @property
    def min_samples(self) -> int:
        """The shortest waveform, in samples, that gives a frame."""
        return receptive_field(self.conv_layers)

    def frames(self, samples: Samples) -> Samples:
        """Number of frames of waveforms with this many samples; 0 or less if they are too short."""
        return (samples - self.min_samples) // self.stride + 1


@dataclass(frozen=True)
class StudentSettings(ConvInput):
    """Size and regularisation of the student; keys and meaning as in s3prl's ``DistillerConfig``.

    The defaults are DistilHuBERT's (inferred): 7 conv layers and 2 transformer layers of width 768,
    23,491,200 parameters without heads.
    """

    KIND: ClassVar[str] = "distil"

    # of copied students, see PrunedSettings
    normalize_waveforms: ClassVar[bool] = False
    position_buckets: ClassVar[int] = 0

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

    train_extractor: bool = True
    """false: the conv extractor keeps the weights of ``init.teacher``, as with
    ``feature_grad_mult: 0``, and teachers with the same weights share its features (ours)."""

    mask: MaskSettings | None = None
    """Masked spans of the conv features in training; null: none."""

    masked_norm: bool = False
    """Take the statistics of the conv extractor's group norm over valid frames only, so that hidden
    states do not depend on padding (ours); see :mod:`.student_forward`."""

    def __post_init__(self) -> None:
        try:
            parse_conv_layers(self.extractor_conv_feature_layers)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        check_range(self, 1, math.inf, "conv_pos", "conv_pos_groups", "encoder_layers")
        check_range(self, 1, math.inf, "encoder_embed_dim", "encoder_ffn_embed_dim")
        check_range(self, 1, math.inf, "encoder_attention_heads")
        check_range(self, 0, math.inf, "feature_grad_mult")
        check_dropout(self)
        check_multiples(self)
        if self.masked_norm and self.extractor_mode == "layer_norm":
            raise ValueError(
                "masked_norm has no effect with extractor_mode: layer_norm, which does not depend "
                "on padding; leave it out"
            )

    @property
    def conv_layers(self) -> ConvLayers:
        """``(channels, kernel, stride)`` of each conv layer."""
        return parse_conv_layers(self.extractor_conv_feature_layers)


@dataclass(frozen=True)
class CopySettings(ConvInput):
    """``kind: copy``: a copy of a teacher with all of its layers, to be pruned (DPHuBERT, arXiv
    2305.17651). The teacher is a HuBERT, wav2vec 2.0 or WavLM."""

    kind: Literal["copy"]
    """``copy``."""

    of: str
    """Name of the teacher in ``teachers``."""

    feature_grad_mult: float = 1.0
    """Factor on the gradient that reaches the conv extractor (DPHuBERT: 1); 0 freezes it."""

    dropout: float = 0.1
    """Dropout after attention and feed-forward network (DPHuBERT)."""

    attention_dropout: float = 0.1
    """Dropout of the attention weights (DPHuBERT)."""

    activation_dropout: float = 0.0
    """Dropout after the activation of the feed-forward network (DPHuBERT)."""

    input_dropout: float = 0.1
    """Dropout of the projected conv features (DPHuBERT)."""

    train_extractor: bool = True
    """false: the conv extractor keeps its weights, as with ``feature_grad_mult: 0``, and teachers
    with the same weights share its features (ours)."""

    mask: MaskSettings | None = None
    """Masked spans of the conv features in training; null: none."""

    masked_norm: bool = False
    """Take the statistics of the conv extractor's group norm over valid frames only, so that hidden
    states do not depend on padding (ours). No effect on a copy whose extractor has layer norms."""

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "feature_grad_mult")
        check_dropout(self)

    @property
    def conv_layers(self) -> ConvLayers:
        """wav2vec 2.0's conv layers; other kernels and strides are not copied."""
        return parse_conv_layers(DEFAULT)


@dataclass(frozen=True)
class FileSettings:
    """``kind: file``: a finished student, to be trained further; for example one of ``s3prl-ekd
    prune`` (the second distillation of DPHuBERT)."""

    kind: Literal["file"]
    """``file``."""

    file: str
    """Path of a student file, or of a checkpoint of a run."""

    keep_heads: bool = True
    """Continue with the file's prediction heads (DPHuBERT); false: new heads."""

    train_extractor: bool = True
    """false: the conv extractor keeps its weights, and teachers with the same weights share its
    features (ours). The extractor of a file with ``feature_grad_mult: 0`` stays frozen in any
    case."""

    mask: MaskSettings | None = None
    """Masked spans of the conv features in training; null: none."""


@dataclass(frozen=True)
class GateSettings:
    """The gates of a student that is being pruned."""

    units: tuple[Unit, ...] = ("conv", "heads", "ffn")
    """What has gates: channels of the conv extractor (``conv``), attention heads (``heads``), units
    of the feed-forward networks (``ffn``), whole attention and feed-forward modules
    (``attention``, ``feed_forward``). The default is DPHuBERT's."""

    last_conv: Literal["hard", "soft"] = "hard"
    """Gates of the last conv layer outside training. ``hard``: 0 or 1 (ours). ``soft``: fractions,
    as in DPHuBERT; they become a scale of the conv features, which Hugging Face's models lack."""

    norms: Literal["kept", "all"] = "kept"
    """Channels over which layer norms of conv features are taken. ``kept``: those whose gate is
    open, so that cutting changes nothing (ours). ``all``: as in DPHuBERT."""

    def __post_init__(self) -> None:
        if not self.units or len(set(self.units)) < len(self.units):
            raise ValueError(f"units must be one or more distinct kinds, got {[*self.units]}")


@dataclass(frozen=True)
class StartDrop:
    """Probability at the start that a gate is below one half; the values of DPHuBERT's code.

    With 0.5, 17 % of the gates are closed, with 0.01 0.2 %.
    """

    conv: float = 0.01
    """Conv channels."""

    heads: float = 0.01
    """Attention heads."""

    ffn: float = 0.5
    """Units of the feed-forward networks."""

    attention: float = 0.01
    """Attention modules."""

    feed_forward: float = 0.01
    """Feed-forward modules."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True)
class PruningSettings(GateSettings):
    """Structured pruning during distillation (DPHuBERT, arXiv 2305.17651): HardConcrete gates, and
    an augmented Lagrangian that raises the expected sparsity to a target."""

    sparsity: float = 0.75
    """Share of the student's cost to remove (DPHuBERT)."""

    by: Literal["parameters", "macs"] = "parameters"
    """Cost: number of parameters (DPHuBERT), or multiply-accumulates for ``seconds`` of audio
    (ours)."""

    seconds: float = 10.0
    """Length of an utterance for ``by: macs``, in seconds (ours)."""

    reach_at: int = 5000
    """Steps after which the target reaches ``sparsity``, linearly from 0 (DPHuBERT)."""

    lr: float = 0.02
    """Learning rate of gates and Lagrange multipliers, with the schedule of the optimizer's ``lr``
    (DPHuBERT)."""

    start_drop: StartDrop = field(default_factory=StartDrop)
    """Probability at the start that a gate is below one half."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "reach_at")
        check_range(self, 0.1, 100, "seconds")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must be between 0 and 1, got {self.sparsity}")

    @property
    def gates(self) -> GateSettings:
        return GateSettings(self.units, self.last_conv, self.norms)


@dataclass(frozen=True)
class PrunedSettings(ConvInput):
    """Architecture of a copied student: HuBERT's or WavLM's, in which each layer has its own number
    of channels, heads and units. Part of its student file; not written by hand."""

    conv_layers: ConvLayers
    """``(channels, kernel, stride)`` of each conv layer."""

    extractor_mode: Literal["default", "layer_norm"]
    """See :class:`StudentSettings`."""

    conv_bias: bool
    """Whether the convolutions of the extractor have a bias."""

    normalize_waveforms: bool
    """Whether waveforms are normalised to zero mean and unit variance."""

    encoder_embed_dim: int
    """Width of the transformer layers."""

    encoder_attention_heads: int
    """Heads of the copied teacher's layers; a head's width is ``encoder_embed_dim`` by this."""

    heads: tuple[tuple[int, ...], ...]
    """The heads of each layer, by their places in the teacher, counted from 0."""

    ffn_dims: tuple[int, ...]
    """Units of each layer's feed-forward network."""

    conv_pos: int
    """Kernel of the convolution that encodes positions, in frames."""

    conv_pos_groups: int
    """Groups of that convolution."""

    activation_fn: Literal["gelu", "relu"]
    """Activation of the feed-forward networks."""

    layer_norm_first: bool
    """Pre-norm instead of post-norm."""

    position_buckets: int = 0
    """Buckets of WavLM's relative positions; 0: no relative positions."""

    max_distance: int = 0
    """Frames from which on all distances share a bucket."""

    feature_scale: bool = False
    """Whether the conv features are scaled (``last_conv: soft``)."""

    gates: GateSettings | None = None
    """The gates; null once the student is cut."""

    masked_norm: bool = False
    """See :class:`StudentSettings`."""

    feature_grad_mult: float = 1.0
    """See :class:`CopySettings`, as for the following."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    input_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "encoder_embed_dim", "encoder_attention_heads")
        check_range(self, 1, math.inf, "conv_pos", "conv_pos_groups")
        check_range(self, 0, math.inf, "position_buckets", "max_distance", "feature_grad_mult")
        check_dropout(self)
        try:
            parse_conv_layers(conv_layers_text(self.conv_layers))
        except (ConfigError, ValueError) as error:
            raise ValueError(str(error)) from None
        if not 0 < len(self.heads) == len(self.ffn_dims) <= MAX_LAYERS:
            raise ValueError(
                f"heads and ffn_dims must have an entry for each of 1 to {MAX_LAYERS} layers"
            )
        for places in self.heads:
            inside = all(0 <= place < self.encoder_attention_heads for place in places)
            if not inside or [*places] != sorted({*places}):
                raise ValueError(
                    f"heads: {[*places]} are not increasing numbers from 0 to "
                    f"{self.encoder_attention_heads - 1}"
                )
        if min(self.ffn_dims) < 0:
            raise ValueError(f"ffn_dims must be 0 or more, got {[*self.ffn_dims]}")
        check_multiples(self)
        if self.position_buckets and (
            self.position_buckets < 4 or self.max_distance <= self.position_buckets // 4
        ):
            raise ValueError(
                "position_buckets must be 4 or more, and max_distance above a quarter of it"
            )

    encoder_layerdrop = 0.0  # not a setting: layer-to-layer heads need all layers

    @property
    def encoder_layers(self) -> int:
        return len(self.heads)

    @property
    def head_dim(self) -> int:
        return self.encoder_embed_dim // self.encoder_attention_heads


Architecture = StudentSettings | PrunedSettings  # of a student that can be built


def matrix_parameters(settings: Architecture) -> int:
    """Number of parameters in convolutions and matrices, without biases and norms."""
    width = settings.encoder_embed_dim
    total, before = 0, 1
    for channels, kernel, _ in settings.conv_layers:
        total += before * channels * kernel
        before = channels
    total += width * (width // settings.conv_pos_groups) * settings.conv_pos
    if isinstance(settings, PrunedSettings):
        heads = sum(map(len, settings.heads))
        total += before * width + 4 * width * settings.head_dim * heads
        return total + 2 * width * sum(settings.ffn_dims)
    total += before * width if before != width else 0  # the feature projection
    inner = settings.encoder_ffn_embed_dim
    return total + settings.encoder_layers * (4 * width * width + 2 * width * inner)


def check_size(settings: Architecture) -> None:
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
