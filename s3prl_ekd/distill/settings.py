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
from .conv_layers import DEFAULT, ConvLayers, parse_conv_layers, receptive_field, stride_of

# Bounds of a student, far above any: HuBERT X-Large, a teacher, has 48 layers and 960 M parameters.
MAX_LAYERS, MAX_PARAMETERS = 256, 1_000_000_000

# ``groups`` is the same as ``separate``: teachers.NAME.groups say what is grouped.
AggregationName = Literal["separate", "average", "concat", "groups"]
Standardise = Literal["none", "running", "phi_s"]


@dataclass(frozen=True)
class TeacherSettings:
    """One teacher: what to load, and which of its layers to predict.

    ``model`` is a hub name of s3prl (``hubert_base``) or the path of a checkpoint. In ``layers``,
    0 is the input of the first transformer layer and n the output of layer n; 4, 8 and 12 are
    inferred from DistilHuBERT. ``groups`` (SKILL, arXiv 2402.16830) replaces ``layers``: the target
    of a group is the average of its layers. ``weight`` is this teacher's share among the others;
    with ``final_weight`` it moves there in a straight line over ``targets.weight_steps`` (ours).
    """

    model: str
    layers: tuple[int, ...] = (4, 8, 12)
    groups: tuple[tuple[int, ...], ...] | None = None
    weight: float = 1.0
    final_weight: float | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and not (self.groups and all(self.groups)):
            raise ValueError("groups is empty: name at least one layer in each group")
        if not self.layers:
            raise ValueError("layers is empty: name at least one layer to predict")
        if min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers {list(self.layers)} must be distinct numbers from 0 up")
        members = [layer for group in self.groups or () for layer in group]
        if members and (min(members) < 0 or len(set(members)) < len(members)):
            raise ValueError("groups must hold distinct layers from 0 up, each in one group")
        if self.weight < 0 or (self.final_weight is not None and self.final_weight < 0):
            raise ValueError("weight and final_weight must be 0 or more")

    @property
    def targets(self) -> tuple[tuple[int, ...], ...]:
        """The layers behind each target: its groups, or each layer alone."""
        return self.groups or tuple((layer,) for layer in self.layers)


@dataclass(frozen=True)
class TargetSettings:
    """How the teachers' layers become targets. All off by default.

    ``separate_heads`` (average, concat): heads for each teacher beside the aggregate's (ours: the
    paper leaves open whether its heads come on top of averaging). ``across_teachers`` (with groups
    of layers): a group's target is averaged over the teachers too. ``residual_heads``: heads that
    predict the difference of each two neighbouring teachers (after "EKD considering inter-teacher
    differences", ISCSLP 2024), ``residual_weight`` their share of the loss. ``standardise``:
    ``running`` mean and deviation of each dimension (after UNIC), or ``phi_s`` (PHI-S, arXiv
    2410.01680), estimated over the first ``standardise_steps`` steps and fixed then.
    ``drop_teachers``: for each utterance the teacher of the highest loss stays and each other is
    dropped with this probability (UNIC uses 0.5). ``weight_steps``: see
    ``teachers.NAME.final_weight``.
    """

    separate_heads: bool = False
    across_teachers: bool = False
    residual_heads: bool = False
    residual_weight: float = 1.0
    standardise: Standardise = "none"
    standardise_steps: int = 1000
    drop_teachers: float = 0.0
    weight_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_teachers <= 1:
            raise ValueError(f"drop_teachers is {self.drop_teachers}; 0 to 1 is allowed")
        if self.residual_weight < 0:
            raise ValueError(f"residual_weight is {self.residual_weight}; 0 or more is allowed")
        if self.standardise_steps < 1 or self.weight_steps < 0:
            raise ValueError("standardise_steps must be 1 or more and weight_steps 0 or more")


@dataclass(frozen=True)
class HeadSettings:
    """``kind``: ``split`` is s3prl's head (Linear, GELU, a Linear for each target; inferred),
    ``linear`` one Linear for each target (ours)."""

    kind: Literal["split", "linear"] = "split"


@dataclass(frozen=True)
class LossSettings:
    """``reconstruction`` + ``cosine_weight`` · ``cosine`` (inferred: L1, 1 and log-sigmoid).

    ``cosine``: ``log_sigmoid`` is −log σ(cos), ``raw`` is 1 − cos (DPHuBERT's, up to the constant).
    ``mask_padding`` keeps padded frames out of the mean (ours; s3prl's distiller has them in).
    ``feature_penalty`` weighs the mean square of the conv features (s3prl's ``feat_pen_loss``).
    """

    reconstruction: Literal["l1", "l2", "smooth_l1"] = "l1"
    cosine: Literal["log_sigmoid", "raw"] = "log_sigmoid"
    cosine_weight: float = 1.0
    mask_padding: bool = True
    feature_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cosine_weight", "feature_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 or more is allowed")


@dataclass(frozen=True)
class EssenceSettings:
    """Select what to learn from the ensemble (in the spirit of Essence KD, arXiv 1906.10834).

    ``keep``: the share of dimensions of each frame and layer that stay in the loss, those in which
    the teachers disagree least; 1 keeps all (ours: the paper selects among soft class outputs).
    ``units``: a file of ``s3prl-ekd units``; its k-means units of one teacher's layer are the hard
    labels of a classification head, with the weight ``unit_weight`` beside the distillation.
    """

    keep: float = 1.0
    units: str | None = None
    unit_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; above 0 and up to 1 is allowed")
        if self.unit_weight < 0:
            raise ValueError(f"unit_weight is {self.unit_weight}; 0 or more is allowed")


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

    def __post_init__(self) -> None:
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


def matrix_parameters(settings: StudentSettings) -> int:
    """The number of parameters in convolutions and matrices: all but biases and norms."""
    width, inner = settings.encoder_embed_dim, settings.encoder_ffn_embed_dim
    total, before = 0, 1
    for channels, kernel, _ in settings.conv_layers:
        total += before * channels * kernel
        before = channels
    total += before * width if before != width else 0  # the feature projection
    total += width * (width // settings.conv_pos_groups) * settings.conv_pos
    return total + settings.encoder_layers * (4 * width * width + 2 * width * inner)


def check_size(settings: StudentSettings) -> None:
    """Reject a student so large that a slip in a YAML file would ask for terabytes.

    Raises:
        ValueError: it has more layers or parameters than the bounds above.
    """
    if settings.encoder_layers > MAX_LAYERS:
        raise ValueError(
            f"encoder_layers is {settings.encoder_layers}; up to {MAX_LAYERS} is allowed"
        )
    count = matrix_parameters(settings)
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"a student of this size has {count:,} parameters; up to {MAX_PARAMETERS:,} is allowed"
        )


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

    def __post_init__(self) -> None:
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
    prediction heads); ``average`` and ``concat`` are the paper's layerwise aggregations;
    ``groups`` is the same as ``separate``, with ``teachers.NAME.groups`` for every teacher.
    ``teacher_dropout`` leaves the teachers' dropout on, as s3prl's distiller does by oversight;
    ours is off.

    ``teacher_path`` (ours): ``fast`` runs our implementation of HuBERT, wav2vec 2.0 and WavLM,
    which is equal to float32's rounding and stops at the highest layer needed; ``plain`` runs
    s3prl's experts. Other kinds of teachers, and all with ``teacher_dropout``, always take the
    plain path. ``teacher_precision`` is what the fast path computes in (the targets come in
    float32), ``teacher_compile`` runs its layers through ``torch.compile``.

    ``student_backend`` (ours): ``ours`` runs the forward of :mod:`.student_forward`, ``s3prl`` that
    of s3prl's ``DistillerModel``, to compare the two: outputs and gradients are equal.
    """

    teachers: dict[str, TeacherSettings]
    aggregation: AggregationName = "separate"
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
    student_backend: Literal["ours", "s3prl"] = "ours"

    def __post_init__(self) -> None:
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
        width = self.student.encoder_embed_dim
        if self.student_backend == "s3prl" and self.student.conv_layers[-1][0] == width:
            raise ValueError(
                f"student_backend: s3prl cannot train a conv extractor as wide as the layers "
                f"({width}); use student_backend: ours"
            )

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
        one_set = self.aggregation in ("average", "concat")
        counts = {name: len(teacher.targets) for name, teacher in self.teachers.items()}
        layerwise = [
            setting
            for setting, on in (
                (f"aggregation {self.aggregation}", one_set),
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
        if targets.across_teachers and (without or one_set):
            raise ValueError(
                "targets.across_teachers averages groups of layers: use aggregation: separate, and "
                "teachers.NAME.groups for every teacher"
            )
        if (targets.residual_heads or self.essence.keep < 1) and len(self.teachers) < 2:
            setting = "targets.residual_heads" if targets.residual_heads else "essence.keep"
            raise ValueError(f"{setting} compares teachers: name at least two")
        one_set = one_set or targets.across_teachers
        if targets.drop_teachers and one_set and not targets.separate_heads:
            raise ValueError(
                "targets.drop_teachers needs heads for each teacher: aggregation: separate, or "
                "targets.separate_heads: true"
            )


# Methods of torch.nn.ModuleDict, where heads are stored by these names, and other target sets.
_TAKEN = {"keys", "items", "values", "pop", "clear", "update", "forward", "type", "train", "to"}
_TAKEN |= {"average", "concat"}


def _at_least(settings: StudentSettings, name: str, least: int) -> None:
    if getattr(settings, name) < least:
        raise ValueError(f"{name} is {getattr(settings, name)}; {least} or more is allowed")


def _probability(settings: StudentSettings, name: str) -> None:
    if not 0 <= getattr(settings, name) < 1:
        raise ValueError(f"{name} is {getattr(settings, name)}; 0 up to below 1 is allowed")
