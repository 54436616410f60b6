"""Settings of what is predicted and how it is compared: teachers, targets, heads, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Aggregation = Literal["separate", "average", "concat", "groups"]
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

    def __post_init__(self):
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
    """What is done to the teachers' layers on their way to being targets. All off by default.

    ``separate_heads`` (average, concat): heads for each teacher beside the aggregate's (ours: the
    paper leaves open whether its heads come on top of averaging). ``across_teachers`` (groups): a
    group's target is averaged over the teachers too. ``residual_heads``: heads that predict the
    difference of each two neighbouring teachers (after "EKD considering inter-teacher differences",
    ISCSLP 2024), ``residual_weight`` their share of the loss. ``standardise``: ``running`` mean and
    deviation of each dimension (UNIC), or ``phi_s`` (PHI-S, arXiv 2410.01680), estimated over the
    first ``standardise_steps`` steps and fixed then. ``drop_teachers``: for each utterance the
    teacher of the highest loss stays and each other is dropped with this probability (UNIC uses
    0.5). ``weight_steps``: see ``teachers.NAME.final_weight``.
    """

    separate_heads: bool = False
    across_teachers: bool = False
    residual_heads: bool = False
    residual_weight: float = 1.0
    standardise: Standardise = "none"
    standardise_steps: int = 1000
    drop_teachers: float = 0.0
    weight_steps: int = 0

    def __post_init__(self):
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

    def __post_init__(self):
        for name in ("cosine_weight", "feature_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 or more is allowed")


@dataclass(frozen=True)
class EssenceSettings:
    """Learn only from what the ensemble is sure of (in the spirit of Essence KD, arXiv 1906.10834).

    ``keep``: the share of dimensions of each frame and layer that stay in the loss, those in which
    the teachers disagree least; 1 keeps all (ours: the paper selects among soft class outputs).
    ``units``: a file of ``s3prl-ekd units``; its k-means units of one teacher's layer are the hard
    labels of a classification head, with the weight ``unit_weight`` beside the distillation.
    """

    keep: float = 1.0
    units: str | None = None
    unit_weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; above 0 and up to 1 is allowed")
        if self.unit_weight < 0:
            raise ValueError(f"unit_weight is {self.unit_weight}; 0 or more is allowed")
