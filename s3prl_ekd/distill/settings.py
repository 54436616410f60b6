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
from .target_settings import (
    Aggregation,
    EssenceSettings,
    HeadSettings,
    LossSettings,
    TargetSettings,
    TeacherSettings,
)


@dataclass(frozen=True)
class StudentSettings:
    """The student's size and regularisation; names and meaning as s3prl's ``DistillerConfig``.

    The defaults are DistilHuBERT's (inferred): 7 conv layers, 2 transformer layers of width 768,
    23,491,200 parameters without heads. ``feature_grad_mult`` scales the gradient that reaches the
    conv extractor; 0 freezes it.
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
class InitSettings:
    """Where the student's first weights come from (inferred: one teacher's first layers).

    ``teacher`` names one of the teachers; null starts from random weights. ``average`` names
    several instead, whose weights are averaged (ours; they must be of one shape). ``layers`` says
    which of the teacher's transformer layers, counted from 0, become the student's, for example
    [0, 6]; null takes the first ones. ``conv`` copies the conv extractor and the feature
    projection, ``encoder`` the positional conv and the layers.
    """

    teacher: str | None = None
    average: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    conv: bool = True
    encoder: bool = True

    def __post_init__(self):
        if self.teacher is not None and self.average:
            raise ValueError("give teacher or average, not both")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError("layers must be numbers from 0 up, or null for the first ones")

    @property
    def sources(self) -> tuple[str, ...]:
        """The teachers whose weights are taken; none for random weights."""
        return self.average or ((self.teacher,) if self.teacher is not None else ())


@dataclass(frozen=True)
class DistillSettings:
    """One experiment: teachers, how their layers become targets, student, start and loss.

    ``aggregation``: ``separate`` gives each teacher its own prediction heads (paper: multiple
    prediction heads); ``average`` and ``concat`` are the paper's layerwise aggregations; ``groups``
    predicts groups of layers (SKILL). ``teacher_dropout`` leaves the teachers' dropout on, as
    s3prl's distiller does by oversight; ours is off.

    ``teacher_path`` (ours): ``fast`` computes HuBERT, wav2vec 2.0 and WavLM teachers another way,
    with the same results to float32's rounding and only as far up as the highest layer needed;
    ``plain`` runs s3prl's experts. Other kinds of teachers, and all with ``teacher_dropout``, take
    the plain path whatever it says. ``teacher_precision`` is what the fast path computes in (the
    targets come in float32), ``teacher_compile`` runs its layers through ``torch.compile``.
    """

    teachers: dict[str, TeacherSettings]
    aggregation: Aggregation = "separate"
    targets: TargetSettings = field(default_factory=TargetSettings)
    heads: HeadSettings = field(default_factory=HeadSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    init: InitSettings = field(default_factory=InitSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    essence: EssenceSettings = field(default_factory=EssenceSettings)
    teacher_dropout: bool = False
    teacher_path: Literal["fast", "plain"] = "fast"
    teacher_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    teacher_compile: bool = False

    def __post_init__(self):
        if not self.teachers:
            raise ValueError("teachers is empty: name at least one")
        for name in self.teachers:
            # The name becomes part of weight names, TensorBoard tags and file names.
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or name in _TAKEN:
                raise ValueError(
                    f"teachers: {name!r} cannot be a teacher's name; use letters, digits and _, "
                    f"starting with a letter, and none of {', '.join(sorted(_TAKEN))}"
                )
        for source in self.init.sources:
            if source not in self.teachers:
                raise ValueError(
                    f"init: there is no teacher {source!r}; use one of: {', '.join(self.teachers)}"
                )
        if self.init.layers is not None and len(self.init.layers) != self.student.encoder_layers:
            raise ValueError(
                f"init.layers names {len(self.init.layers)} layers and the student has "
                f"{self.student.encoder_layers}; one for each"
            )
        self._check_weights()
        self._check_targets()
        self._check_speed()

    def _check_speed(self) -> None:
        plain = self.teacher_path == "plain" or self.teacher_dropout
        why = "teacher_dropout: true" if self.teacher_dropout else "teacher_path: plain"
        if plain and self.teacher_precision != "float32":
            raise ValueError(
                f"teacher_precision {self.teacher_precision} is for the fast path; with {why} the "
                "teachers run in float32"
            )
        if plain and self.teacher_compile:
            raise ValueError(f"teacher_compile is for the fast path; {why} has no use for it")

    def _check_weights(self) -> None:
        moving = [name for name, t in self.teachers.items() if t.final_weight is not None]
        if moving and self.targets.weight_steps == 0:
            raise ValueError(
                f"teachers.{moving[0]}.final_weight needs targets.weight_steps: the step at which "
                "it is reached"
            )
        first = sum(teacher.weight for teacher in self.teachers.values())
        last = sum(
            teacher.weight if teacher.final_weight is None else teacher.final_weight
            for teacher in self.teachers.values()
        )
        if first == 0 or last == 0:
            raise ValueError("teachers: the weights are all 0, at the start or at the end")

    def _check_targets(self) -> None:
        targets = self.targets
        without = [name for name, teacher in self.teachers.items() if teacher.groups is None]
        if self.aggregation == "groups" and without:
            raise ValueError(
                f"aggregation groups needs teachers.{without[0]}.groups; write them, or let "
                "s3prl-ekd layers find them"
            )
        counts = {name: len(teacher.targets) for name, teacher in self.teachers.items()}
        layerwise = [
            word
            for word, on in (
                (f"aggregation {self.aggregation}", self.aggregation in ("average", "concat")),
                ("targets.across_teachers", targets.across_teachers),
                ("targets.residual_heads", targets.residual_heads),
                ("essence.keep", self.essence.keep < 1),
            )
            if on
        ]
        if layerwise and len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ValueError(
                f"{layerwise[0]} goes layer by layer, so every teacher needs as many layers "
                f"({shown}); or use aggregation: separate"
            )
        if targets.across_teachers and self.aggregation != "groups":
            raise ValueError("targets.across_teachers is for aggregation: groups")
        if (targets.residual_heads or self.essence.keep < 1) and len(self.teachers) < 2:
            word = "targets.residual_heads" if targets.residual_heads else "essence.keep"
            raise ValueError(f"{word} compares teachers: name at least two")
        one_set = self.aggregation in ("average", "concat") or targets.across_teachers
        if targets.drop_teachers and one_set and not targets.separate_heads:
            raise ValueError(
                "targets.drop_teachers needs heads for each teacher: aggregation: separate, or "
                "targets.separate_heads: true"
            )


# Methods of torch.nn.ModuleDict: a head of such a name could not be stored.
_TAKEN = {"keys", "items", "values", "pop", "clear", "update", "forward", "type", "train", "to"}
# Names of target sets that are no teacher's.
_TAKEN |= {"average", "concat"}


def _at_least(settings, name: str, least: int) -> None:
    if getattr(settings, name) < least:
        raise ValueError(f"{name} is {getattr(settings, name)}; {least} or more is allowed")


def _probability(settings, name: str) -> None:
    if not 0 <= getattr(settings, name) < 1:
        raise ValueError(f"{name} is {getattr(settings, name)}; 0 up to below 1 is allowed")
