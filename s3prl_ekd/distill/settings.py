"""The model config of an experiment, as frozen dataclasses.

The docstring under each key says what it does and where its default comes from: *paper* (arXiv
2302.12757, abstract), *inferred* (from DistilHuBERT, arXiv 2110.01900, and s3prl's distiller) or
*ours*. Values are checked on construction. Building these classes needs no torch, so a YAML file is
checked before torch is imported.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from .ranges import check_range
from .student_settings import (
    Architecture,
    CopySettings,
    FileSettings,
    PruningSettings,
    StudentSettings,
)

AggregationName = Literal["separate", "average", "concat"]
TargetNormName = Literal["none", "mean_std", "phi_s", "procrustes"]


@dataclass(frozen=True)
class TeacherSettings:
    """One teacher: which model to load and which of its layers to predict."""

    model: str
    """Hub name of s3prl (``hubert_base``), tiny teacher (``tiny_hubert``), path of a checkpoint or
    folder, or id on the Hugging Face Hub (``ORG/NAME`` or ``ORG/NAME@REVISION``)."""

    layers: tuple[int, ...] = (4, 8, 12)
    """Layers to predict (inferred from DistilHuBERT). 0 is the input of the first transformer
    layer, n the output of layer n."""

    groups: tuple[tuple[int, ...], ...] | None = None
    """Groups of layers, in place of ``layers``: the target of a group is the mean of its layers
    (SKILL, arXiv 2402.16830). ``s3prl-ekd group-layers`` finds groups by clustering."""

    weight: float = 1.0
    """Weight of this teacher relative to the others (ours)."""

    final_weight: float | None = None
    """Weight after ``targets.weight_steps`` steps, reached linearly from ``weight``; null keeps
    ``weight`` (ours)."""

    def __post_init__(self) -> None:
        if self.groups is not None and not (self.groups and all(self.groups)):
            raise ValueError("groups must have at least one layer in each group")
        if not self.layers:
            raise ValueError("layers is empty; name at least one layer to predict")
        if min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must be distinct numbers of 0 or more, got {[*self.layers]}")
        members = [layer for group in self.groups or () for layer in group]
        if members and (min(members) < 0 or len(set(members)) < len(members)):
            raise ValueError("groups must have distinct layers of 0 or more, each in one group")
        check_range(self, 0, math.inf, "weight", "final_weight")

    @property
    def targets(self) -> tuple[tuple[int, ...], ...]:
        """The layers averaged for each target: the groups, or each layer alone."""
        return self.groups or tuple((layer,) for layer in self.layers)


@dataclass(frozen=True)
class TargetSettings:
    """Options for combining the teachers' layers into targets; all off by default."""

    across_teachers: bool = False
    """With ``teachers.NAME.groups``: average each group's target over the teachers too (ours)."""

    drop_teachers: float = 0.0
    """Teacher dropping: for each utterance, the teacher with the highest loss is kept and each of
    the others is dropped with this probability (after UNIC, arXiv 2408.05088, which uses 0.5). The
    loss is divided by the number of all teachers' frames, dropped ones included (ours). With n
    teachers and probability p, on average (1 + (n - 1)(1 - p)) / n of the frames are kept, and the
    loss shrinks to about this share."""

    weight_steps: int = 0
    """Steps until each teacher's weight reaches ``teachers.NAME.final_weight`` (ours)."""

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "drop_teachers")
        check_range(self, 0, math.inf, "weight_steps")


@dataclass(frozen=True)
class HeadSettings:
    """The prediction heads."""

    kind: Literal["split", "linear", "layerwise"] = "split"
    """``split``: s3prl's head, a linear layer, GELU and a linear layer for each target (inferred).
    ``linear``: one linear layer for each target (ours). These two read the student's last hidden
    state. ``layerwise``: a target is predicted from the same layer of the student by a linear layer
    that is the identity at the start (DPHuBERT, arXiv 2305.17651)."""

    share: tuple[tuple[int, ...], ...] | None = None
    """For ``layerwise``: groups of layers that share a linear layer; null: layer 0 has its own and
    all others share one, as in DPHuBERT."""

    of_group: Literal["mean", "last"] = "mean"
    """For ``layerwise`` and a group of layers: it is predicted from the mean of the student's
    layers of this group, or from the last of them (ours: SKILL's paper does not say)."""

    per_teacher: bool = False
    """With ``average`` or ``concat``: heads for each teacher in addition to those of the aggregate
    (ours: the paper's abstract leaves open whether its heads come on top of averaging)."""

    residual: bool = False
    """Heads that predict the difference between each teacher and the next: one of the two parts of
    "EKD considering inter-teacher differences" (ISCSLP 2024)."""

    residual_weight: float = 1.0
    """Weight of the residual heads in the loss (ours)."""

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "residual_weight")
        members = [layer for group in self.share or () for layer in group]
        for name, default in (("share", None), ("of_group", "mean")):
            if self.kind != "layerwise" and getattr(self, name) != default:
                raise ValueError(f"{name} needs kind: layerwise, got kind: {self.kind}")
        if len(set(members)) < len(members) or (members and min(members) < 0):
            raise ValueError("share must have distinct layers of 0 or more, each in one group")


@dataclass(frozen=True)
class LossSettings:
    """The distillation loss: ``weight`` · (``reconstruction`` + ``cosine_weight`` · ``cosine``)."""

    weight: float = 1.0
    """Weight of the distillation loss; 0: learn from ``relation`` and ``unit_loss`` only (ours)."""

    reconstruction: Literal["l1", "l2", "smooth_l1"] = "l1"
    """Distance between prediction and target, averaged over dimensions (inferred: L1)."""

    cosine: Literal["log_sigmoid", "raw"] = "log_sigmoid"
    """``log_sigmoid``: −log σ(cos) (inferred). ``raw``: 1 − cos, DPHuBERT's up to the constant."""

    cosine_weight: float = 1.0
    """Weight of the cosine term (inferred)."""

    agreement: float = 1.0
    """Share of the dimensions of each frame and layer that count in the loss: those in which the
    teachers differ least. 1: all. After Essence KD (arXiv 1906.10834), which selects among soft
    class outputs; selecting dimensions is ours."""

    mask_padding: bool = True
    """Leave padded frames out of the mean (ours; s3prl's distiller includes them)."""

    reduce: Literal["frames", "batches"] = "frames"
    """``frames``: a term is the mean over all frames of a step, of all accumulated batches and
    processes (ours). ``batches``: the mean of the batches' means, as in s3prl's Runner; a frame of
    a batch with few frames then has a larger weight. With one batch per step in all (one
    process, no accumulation) both are equal, except for ``feature_penalty``."""

    feature_penalty: float = 0.0
    """Weight of the mean square of the conv features (s3prl's ``feat_pen_loss``). The mean is over
    valid frames (ours); with ``reduce: batches`` it includes padding (s3prl)."""

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "weight", "cosine_weight", "feature_penalty")
        if not 0 < self.agreement <= 1:
            raise ValueError(f"agreement must be above 0 and at most 1, got {self.agreement}")


@dataclass(frozen=True)
class UnitLossSettings:
    """Classification of the k-means units of one teacher's layer, added to the distillation loss.

    Hard labels: Essence KD (arXiv 1906.10834). Masked prediction of a teacher's units: DiceHuBERT
    (arXiv 2507.02911), after HuBERT (arXiv 2106.07447). Units of several teachers are ours."""

    file: str
    """File of ``s3prl-ekd fit-units``: k-means units of one teacher's layer."""

    weight: float = 1.0
    """Weight of the cross-entropy: with ``student.mask`` of masked frames (HuBERT), and otherwise
    of all frames (ours)."""

    unmasked_weight: float = 0.0
    """With ``student.mask``: weight of the cross-entropy of the other frames (HuBERT: 0)."""

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "weight", "unmasked_weight")


@dataclass(frozen=True)
class RelationSettings:
    """Temporal relations: the squared difference between similarities of frames in the student and
    in the teachers (STaRHuBERT, arXiv 2312.09040; the mean over teachers is ours)."""

    weight: float = 0.0
    """Weight of the term; 0: off."""

    similarity: Literal["cosine", "centred"] = "cosine"
    """``cosine``: cosine of two frames. ``centred``: the same, after the mean frame of the window
    has been subtracted. Both are ours: frames of different teachers differ in scale."""

    window: int = 100
    """Frames of a window; frames of different windows are not compared, so memory grows linearly
    with the length of an utterance (ours)."""

    between_layers: bool = False
    """Also compare the frames of each target layer with those of the next one (STaRHuBERT: input
    and output of each layer)."""

    student_layers: tuple[int, ...] | None = None
    """The student's layer for each target of a teacher; null: the layer of the same relative depth,
    rounded, and at least 1 unless the target is layer 0 (ours)."""

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "weight")
        check_range(self, 2, math.inf, "window")
        if self.student_layers is not None and min(self.student_layers, default=-1) < 0:
            raise ValueError("student_layers must be one or more numbers of 0 or more, or null")

    def check_student(self, layers: int, layerdrop: float) -> None:
        """Raise ValueError if a student of so many layers lacks one, or skips some at random."""
        highest = max(self.student_layers or (0,))
        if highest > layers:
            raise ValueError(
                f"relation.student_layers: no layer {highest}; the student has layers 0 to {layers}"
            )
        if layerdrop > 0:
            raise ValueError(
                "relation compares layers of the student, but student.encoder_layerdrop skips some "
                "at random; set it to 0"
            )


@dataclass(frozen=True)
class InitSettings:
    """The student's initial weights (inferred: the first layers of one teacher)."""

    teacher: str | None = None
    """The teacher whose weights are copied; null: random weights."""

    average: tuple[str, ...] = ()
    """Several teachers of equal shapes whose weights are averaged, in place of ``teacher``
    (ours)."""

    layers: tuple[int, ...] | None = None
    """Transformer layers of the teacher to copy, counted from 0, for example [0, 6]; null: the
    first ones."""

    conv: bool = True
    """Copy the conv extractor and the feature projection."""

    encoder: bool = True
    """Copy the positional convolution and the transformer layers."""

    def __post_init__(self) -> None:
        if self.teacher is not None and self.average:
            raise ValueError("teacher and average exclude each other; set one of them")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError("layers must be numbers of 0 or more, or null for the first layers")

    @property
    def sources(self) -> tuple[str, ...]:
        """The teachers whose weights are copied; empty for random weights."""
        return self.average or ((self.teacher,) if self.teacher is not None else ())


@dataclass(frozen=True)
class DistillSettings:
    """One experiment: teachers, targets, student, initial weights and loss."""

    teachers: dict[str, TeacherSettings]
    """The teachers by a name of your choice, which appears in the log and in TensorBoard (paper:
    "such as HuBERT, RobustHuBERT, and WavLM")."""

    aggregation: AggregationName = "separate"
    """``separate``: prediction heads for each teacher. ``average``: heads for the layerwise average
    of the teachers. ``concat``: heads for their layerwise concatenation. All three: paper."""

    targets: TargetSettings = field(default_factory=TargetSettings)
    """Options for combining layers into targets."""

    target_norm: TargetNormName = "none"
    """Normalisation of each teacher's targets before aggregation. ``mean_std``: subtract the mean
    of each dimension and divide by its standard deviation (after UNIC, arXiv 2408.05088; estimated
    and frozen our way). ``phi_s``: PHI-S (arXiv 2410.01680). ``procrustes``: rotate each target
    onto the same target of the first teacher, and scale it (ours)."""

    target_norm_steps: int = 1000
    """Batches of each process over which the statistics of ``target_norm`` are estimated before
    they are frozen; with accumulation, a step has several (ours)."""

    heads: HeadSettings = field(default_factory=HeadSettings)
    """The prediction heads."""

    student: StudentSettings | CopySettings | FileSettings = field(default_factory=StudentSettings)
    """The student. Its key ``kind`` is ``distil`` (the default), ``copy`` or ``file``."""

    pruning: PruningSettings | None = None
    """Structured pruning of a student of ``kind: copy``; null: none."""

    init: InitSettings = field(default_factory=InitSettings)
    """The student's initial weights."""

    loss: LossSettings = field(default_factory=LossSettings)
    """The distillation loss."""

    unit_loss: tuple[UnitLossSettings, ...] = ()
    """Classification of k-means units, added to the loss: one entry for each file of units."""

    relation: RelationSettings = field(default_factory=RelationSettings)
    """Temporal relations, added to the loss."""

    teacher_dropout: bool = False
    """Leave the teachers' dropout on, as s3prl's distiller does by oversight (ours: off)."""

    teacher_backend: Literal["fast", "s3prl"] = "fast"
    """``fast``: our implementation of HuBERT, wav2vec 2.0, WavLM and UniSpeech-SAT, equal to
    s3prl's up to float32 rounding, which stops at the highest layer needed. ``s3prl``: s3prl's own
    upstreams. Other teachers, and all teachers with ``teacher_dropout``, always run as ``s3prl``
    (ours)."""

    teacher_precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision in which ``fast`` teachers compute; targets are converted to float32 (ours).
    ``auto``: bfloat16 on GPUs from Ampere on and on CPUs with AMX, float32 elsewhere; with a target
    cache, the precision of the cache. Other teachers compute in float32."""

    teacher_masked_norm: bool = False
    """Take the statistics of the group norm in ``fast`` teachers over valid frames only, so that
    targets do not depend on padding and equal those of a target cache (ours)."""

    teacher_compile: bool = False
    """Compile the layers of ``fast`` teachers with ``torch.compile`` (ours)."""

    student_backend: Literal["ours", "s3prl"] = "ours"
    """Forward pass of the student: ``ours`` (:mod:`~s3prl_ekd.distill.student_forward`) or that of
    s3prl's ``DistillerModel``, for comparison; outputs and gradients are equal."""

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError("teachers is empty; name at least one teacher")
        check_range(self, 1, math.inf, "target_norm_steps")
        for name in self.teachers:
            # The name becomes part of weight names, TensorBoard tags and file names.
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
                raise ValueError(
                    f"teachers: {name!r} is not a valid name; use letters, digits and _, and start "
                    "with a letter"
                )
            if name in _RESERVED or name.startswith("register_"):
                raise ValueError(f"teachers: {name!r} is a reserved name; use another one")
        for source in self.init.sources:
            if source not in self.teachers:
                raise ValueError(
                    f"init: no teacher {source!r}; use one of: {', '.join(self.teachers)}"
                )
        self._check_student()
        self._check_heads()
        self._check_weights()
        self._check_layer_counts()
        self._check_terms()
        self._check_targets()
        self._check_backends()

    def check_new(self) -> None:
        """Raise ValueError for what a new run must not have; earlier checkpoints may have it."""
        student, init = self.student, self.init
        if init.sources and not (init.conv or init.encoder):
            raise ValueError(
                "init copies nothing with conv: false and encoder: false; set one of them to true, "
                "or init.teacher: null"
            )
        if isinstance(student, StudentSettings):
            fixed = student.train_extractor and student.feature_grad_mult == 0
            if fixed and not (init.sources and init.conv):
                raise ValueError(
                    "student.feature_grad_mult: 0 would keep a conv extractor of random weights; "
                    "set init.teacher and init.conv: true, or set it above 0"
                )
            if self.heads.kind == "layerwise":
                for name, teacher in self.teachers.items():
                    check_layerwise(f"of {name}", max(map(max, teacher.targets)), student)

    @property
    def without_effect(self) -> list[str]:
        """Keys that have no effect, since other settings switch them off."""
        init, heads, targets = self.init, self.heads, self.targets
        separate = self.aggregation == "separate" and not targets.across_teachers
        scheduled = any(teacher.final_weight is not None for teacher in self.teachers.values())
        frozen = getattr(self.student, "feature_grad_mult", None) == 0
        off = {
            "init.layers": init.layers is not None and not (init.sources and init.encoder),
            "heads.per_teacher": heads.per_teacher and separate,
            "heads.residual_weight": heads.residual_weight != 1 and not heads.residual,
            "targets.weight_steps": targets.weight_steps > 0 and not scheduled,
            "targets.drop_teachers": targets.drop_teachers > 0
            and (len(self.teachers) == 1 or self.loss.weight == 0),
            "target_norm_steps": self.target_norm_steps != DistillSettings.target_norm_steps
            and self.target_norm == "none",
            "relation": self.relation.weight == 0 and self.relation != RelationSettings(),
            "loss.feature_penalty": self.loss.feature_penalty > 0 and frozen,
        }
        return [key for key, is_off in off.items() if is_off]

    def _check_backends(self) -> None:
        slow = self.teacher_backend == "s3prl" or self.teacher_dropout
        why = "teacher_dropout: true" if self.teacher_dropout else "teacher_backend: s3prl"
        if slow and self.teacher_precision not in ("auto", "float32"):
            raise ValueError(
                f"teacher_precision: {self.teacher_precision} needs teacher_backend: fast; with "
                f"{why} the teachers run in float32"
            )
        if slow and self.teacher_compile:
            raise ValueError(f"teacher_compile needs teacher_backend: fast; remove it or {why}")
        if slow and self.teacher_masked_norm:
            raise ValueError(f"teacher_masked_norm needs teacher_backend: fast; remove it or {why}")
        if self.student_backend == "s3prl":
            for key in ("mask", "masked_norm"):
                if getattr(self.student, key, None):
                    raise ValueError(f"student.{key} needs student_backend: ours")
        if not isinstance(self.student, StudentSettings):
            if self.student_backend == "s3prl":
                raise ValueError("student_backend: s3prl needs student.kind: distil; use ours")
            return
        width = self.student.encoder_embed_dim
        if self.student_backend == "s3prl" and self.student.conv_layers[-1][0] == width:
            raise ValueError(
                "student_backend: s3prl cannot train a student whose conv extractor is as wide as "
                f"its transformer layers ({width}); use student_backend: ours"
            )

    def _check_student(self) -> None:
        student, pruning = self.student, self.pruning
        if isinstance(student, StudentSettings):
            layers = self.init.layers
            if layers is not None and len(layers) != student.encoder_layers:
                raise ValueError(
                    "init.layers must name a layer for each of the student's "
                    f"{student.encoder_layers}, got {len(layers)}"
                )
            if not (student.train_extractor or (self.init.sources and self.init.conv)):
                raise ValueError(
                    "student.train_extractor: false would keep a conv extractor of random weights; "
                    "set init.teacher and init.conv: true, or set it to true"
                )
        elif self.init.sources:
            raise ValueError(
                f"init needs student.kind: distil; a student of kind: {student.kind} has weights "
                "already, so leave init out"
            )
        if self.loss.feature_penalty and not student.train_extractor:
            raise ValueError(
                "loss.feature_penalty has no effect with student.train_extractor: false; set it to "
                "0 or train the extractor"
            )
        if isinstance(student, CopySettings) and student.of not in self.teachers:
            raise ValueError(
                f"student.of: no teacher {student.of!r}; use one of: {', '.join(self.teachers)}"
            )
        if pruning is None:
            return
        if not isinstance(student, CopySettings):
            raise ValueError("pruning needs student.kind: copy, a copy of a teacher")
        frozen = "" if student.feature_grad_mult else "feature_grad_mult is 0; raise it"
        if not student.train_extractor:
            frozen = "train_extractor is false; set it to true"
        if frozen and "conv" in pruning.units:
            raise ValueError(
                "pruning.units: conv needs a trained conv extractor, but "
                f"student.{frozen} or leave out conv"
            )

    def _check_heads(self) -> None:
        share = self.heads.share
        if share is None:
            return
        shared = {layer for group in share for layer in group}
        for name, teacher in self.teachers.items():
            for target in teacher.targets:
                if not any(set(target) <= set(group) for group in share):
                    raise ValueError(
                        f"heads.share: no group has the layers {[*target]} of teachers.{name}; it "
                        f"has the layers {sorted(shared)}"
                    )

    def _check_weights(self) -> None:
        scheduled = [name for name, t in self.teachers.items() if t.final_weight is not None]
        if scheduled and self.targets.weight_steps == 0:
            raise ValueError(
                f"teachers.{scheduled[0]}.final_weight needs targets.weight_steps, the number of "
                "steps after which it is reached"
            )
        first = sum(teacher.weight for teacher in self.teachers.values())
        last = sum(
            teacher.weight if teacher.final_weight is None else teacher.final_weight
            for teacher in self.teachers.values()
        )
        if first == 0 or last == 0:
            raise ValueError(
                "teachers: all weights are 0 at the first or the last step; set one above 0"
            )

    def _check_layer_counts(self) -> None:
        """Check that teachers and student have as many layers as what compares them needs."""
        counts = {name: len(teacher.targets) for name, teacher in self.teachers.items()}
        layerwise = [
            setting
            for setting, on in (
                (f"aggregation: {self.aggregation}", self.aggregation != "separate"),
                ("targets.across_teachers", self.targets.across_teachers),
                ("heads.residual", self.heads.residual),
                ("loss.agreement", self.loss.agreement < 1),
                ("target_norm: procrustes", self.target_norm == "procrustes"),
                ("relation", self.relation.weight > 0),
            )
            if on
        ]
        if layerwise and len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ValueError(
                f"{layerwise[0]} works layer by layer and needs the same number of layers from "
                f"each teacher ({shown})"
                + ("; or use aggregation: separate" if layerwise[0].startswith("agg") else "")
            )
        chosen = self.relation.student_layers
        if self.relation.weight and chosen is not None and {len(chosen)} != {*counts.values()}:
            raise ValueError(
                "relation.student_layers must name a layer of the student for each target of a "
                f"teacher, got {len(chosen)} for {max(counts.values())}"
            )

    def _check_terms(self) -> None:
        """Check that the terms of the loss leave something to learn, and fit the student."""
        terms = any(unit.weight or unit.unmasked_weight for unit in self.unit_loss)
        if not (self.loss.weight or self.relation.weight or terms):
            raise ValueError(
                "loss.weight: 0 leaves nothing to learn; set it above 0, or add relation or "
                "unit_loss with a weight above 0"
            )
        if isinstance(self.student, StudentSettings) and self.relation.weight:
            self.relation.check_student(self.student.encoder_layers, self.student.encoder_layerdrop)
        if self.student.mask is not None and not any(unit.weight for unit in self.unit_loss):
            raise ValueError(
                "student.mask hides frames that nothing is then learned from; add unit_loss "
                "with a weight above 0, a list of files of s3prl-ekd fit-units, or remove "
                "student.mask"
            )
        for i, unit_loss in enumerate(self.unit_loss):
            if unit_loss.unmasked_weight and self.student.mask is None:
                raise ValueError(f"unit_loss[{i}].unmasked_weight needs student.mask")

    def _check_targets(self) -> None:
        if self.target_norm == "procrustes" and len(self.teachers) < 2:
            raise ValueError("target_norm: procrustes rotates teachers onto the first; add another")
        if self.targets.across_teachers and (
            self.aggregation != "separate" or any(t.groups is None for t in self.teachers.values())
        ):
            raise ValueError(
                "targets.across_teachers needs aggregation: separate, and teachers.NAME.groups for "
                "every teacher"
            )
        if (self.heads.residual or self.loss.agreement < 1) and len(self.teachers) < 2:
            setting = "heads.residual" if self.heads.residual else "loss.agreement"
            raise ValueError(f"{setting} compares teachers and needs at least two")
        aggregated = self.aggregation != "separate" or self.targets.across_teachers
        if self.targets.drop_teachers and aggregated and not self.heads.per_teacher:
            raise ValueError(
                "targets.drop_teachers needs heads for each teacher: use aggregation: separate, or "
                "heads.per_teacher: true"
            )


def check_layerwise(targets: str, highest: int, student: Architecture) -> None:
    """Raise ValueError if a student lacks layers for layer-to-layer heads, or skips some at random.

    Args:
        targets: which targets, for the message.
        highest: the highest layer among them.
    """
    if student.encoder_layerdrop > 0:
        raise ValueError(
            "heads.kind: layerwise needs all layers of the student, but "
            f"student.encoder_layerdrop is {student.encoder_layerdrop}; set it to 0"
        )
    if highest > student.encoder_layers:
        raise ValueError(
            f"heads.kind: layerwise needs layer {highest} of the student for the targets "
            f"{targets}; it has layers 0 to {student.encoder_layers}"
        )


# Attributes of torch.nn.ModuleDict and of ours, whose keys are teachers' names, and names of other
# target sets.
_RESERVED = frozenset(
    """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda
    double dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter
    get_submodule half ipu items keys load_state_dict modules mtia named_buffers named_children
    named_modules named_parameters parameters pop requires_grad_ set_extra_state set_submodule
    share_memory state_dict to to_empty train training type update values xpu zero_grad
    dropout highest_layer kind settings shapes states states_among targets
    average concat
    """.split()
)
