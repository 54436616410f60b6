"""The settings of the method, as frozen dataclasses that check themselves.

Each default says where it comes from: *paper* (arXiv 2302.12757, abstract), *inferred* (from
DistilHuBERT, arXiv 2110.01900, and s3prl's distiller) or *ours*. No torch is needed to build one,
so a YAML file is checked before anything heavy is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ConfigError
from .conv_spec import DEFAULT, ConvLayers, parse_conv_layers, receptive_field, stride_of

Aggregation = Literal["separate", "average", "concat"]


@dataclass(frozen=True)
class StudentSettings:
    """The student's size and regularisation; names and meaning as s3prl's ``DistillerConfig``.

    The defaults are DistilHuBERT's (inferred): 7 conv layers, 2 transformer layers of width 768,
    23,491,200 parameters without heads.
    """

    extractor_mode: Literal["default", "layer_norm"] = "default"
    extractor_conv_feature_layers: str = DEFAULT
    extractor_dropout: float = 0.0
    feature_grad_mult: float = 0.1
    conv_pos: int = 128
    conv_pos_groups: int = 16
    encoder_layers: int = 2
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: Literal["gelu", "relu"] = "gelu"
    layer_norm_first: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    encoder_layerdrop: float = 0.0

    def __post_init__(self):
        try:
            parse_conv_layers(self.extractor_conv_feature_layers)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for name in ("conv_pos", "conv_pos_groups", "encoder_layers", "encoder_embed_dim"):
            _at_least(self, name, 1)
        for name in ("encoder_ffn_embed_dim", "encoder_attention_heads"):
            _at_least(self, name, 1)
        _at_least(self, "feature_grad_mult", 0)
        for name in ("extractor_dropout", "dropout", "attention_dropout"):
            _probability(self, name)
        for name in ("activation_dropout", "encoder_layerdrop"):
            _probability(self, name)
        for name in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, name):
                raise ValueError(
                    f"encoder_embed_dim {self.encoder_embed_dim} cannot be divided by "
                    f"{name} {getattr(self, name)}"
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


@dataclass(frozen=True)
class TeacherSettings:
    """One teacher: what to load, and which of its layers to predict.

    ``model`` is a hub name of s3prl (``hubert_base``) or the path of a checkpoint. In ``layers``,
    0 is the input of the first transformer layer and n the output of layer n; 4, 8 and 12 are
    inferred from DistilHuBERT.
    """

    model: str
    layers: tuple[int, ...] = (4, 8, 12)

    def __post_init__(self):
        if not self.layers:
            raise ValueError("layers is empty: name at least one layer to predict")
        if min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers {list(self.layers)} must be distinct numbers from 0 up")


@dataclass(frozen=True)
class InitSettings:
    """Where the student's first weights come from (inferred: one teacher's first layers).

    ``teacher`` names one of the teachers; null starts from random weights. ``conv`` copies the conv
    extractor and the feature projection, ``encoder`` the positional conv and the first layers.
    """

    teacher: str | None = None
    conv: bool = True
    encoder: bool = True


@dataclass(frozen=True)
class LossSettings:
    """L1 + ``cosine_weight`` · (−log σ cos) (inferred: both terms and the weight of 1).

    ``mask_padding`` keeps padded frames out of the mean (ours; s3prl's distiller has them in).
    ``feature_penalty`` weighs the mean square of the conv features (s3prl's ``feat_pen_loss``).
    """

    cosine_weight: float = 1.0
    mask_padding: bool = True
    feature_penalty: float = 0.0

    def __post_init__(self):
        _at_least(self, "cosine_weight", 0)
        _at_least(self, "feature_penalty", 0)


@dataclass(frozen=True)
class DistillSettings:
    """One experiment: teachers, how their layers become targets, student, start and loss.

    ``aggregation``: ``separate`` gives each teacher its own prediction heads (paper: multiple
    prediction heads); ``average`` and ``concat`` are the paper's layerwise aggregations.
    ``teacher_dropout`` leaves the teachers' dropout on, as s3prl's distiller does by oversight;
    ours is off.
    """

    teachers: dict[str, TeacherSettings]
    aggregation: Aggregation = "separate"
    student: StudentSettings = field(default_factory=StudentSettings)
    init: InitSettings = field(default_factory=InitSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    teacher_dropout: bool = False

    def __post_init__(self):
        if not self.teachers:
            raise ValueError("teachers is empty: name at least one")
        for name in self.teachers:
            # The name becomes part of weight names, TensorBoard tags and file names.
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name) or name in _TAKEN:
                raise ValueError(
                    f"teachers: {name!r} cannot be a teacher's name; use letters, digits, _ and -, "
                    f"starting with a letter, and none of {', '.join(sorted(_TAKEN))}"
                )
        if self.init.teacher is not None and self.init.teacher not in self.teachers:
            raise ValueError(
                f"init.teacher: there is no teacher {self.init.teacher!r}; "
                f"use one of: {', '.join(self.teachers)}"
            )
        counts = {name: len(teacher.layers) for name, teacher in self.teachers.items()}
        if self.aggregation != "separate" and len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ValueError(
                f"aggregation {self.aggregation} goes layer by layer, so every teacher needs as "
                f"many layers ({shown}); or use aggregation: separate"
            )


# Methods of torch.nn.ModuleDict: a head of such a name could not be stored.
_TAKEN = {"keys", "items", "values", "pop", "clear", "update", "forward", "type", "train", "to"}


def _at_least(settings, name: str, least: int) -> None:
    if getattr(settings, name) < least:
        raise ValueError(f"{name} is {getattr(settings, name)}; {least} or more is allowed")


def _probability(settings, name: str) -> None:
    if not 0 <= getattr(settings, name) < 1:
        raise ValueError(f"{name} is {getattr(settings, name)}; 0 up to below 1 is allowed")
