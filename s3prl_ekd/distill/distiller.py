"""The distillation step: teachers, student, heads, aggregation, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import Targets, build_aggregation, one_width
from .batch import DistillBatch
from .conv_extractor import Shared
from .frame_counts import FrameCounts, count_frames, divide
from .heads import PredictionHeads, check_layers
from .losses import (
    Comparison,
    FeaturePenalty,
    Logs,
    LossWeights,
    distillation_loss,
    distillation_terms,
)
from .settings import DistillSettings
from .student import Student
from .student_forward import StudentOutput
from .teachers import HiddenStates, TeacherEnsemble
from .weighting import Agreement, TeacherDropping, weights_at

if TYPE_CHECKING:
    from .pruning.sparsity import SparsityTerm
    from .relation import RelationLoss
    from .span_mask import MaskEmbedding
    from .target_norm import TargetNorm
    from .unit_loss import UnitLabels


class EnsembleDistiller(nn.Module):
    """Ensemble knowledge distillation (Huang et al. 2023, arXiv 2302.12757).

    Args:
        teachers: the frozen teachers, by their names in the settings.
        student: the student.
        settings: the experiment.
        units: hard labels for classification heads, one for each of ``settings.unit_loss``.

    Attributes:
        trainable: the modules to optimise: student, heads, and those of options.
        weightings: options that change the weights of frames and dimensions in the loss.
        terms: options that are added to the loss.

    Raises:
        TeacherError: the teachers' widths do not allow the aggregation, their frame rate is not the
            student's, or the units' layer does not exist.
    """

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: Student,
        settings: DistillSettings,
        units: Sequence[UnitLabels] = (),
    ):
        super().__init__()
        for name, teacher in teachers.items():
            if teacher.stride != student.settings.stride:
                raise TeacherError(
                    f"teachers.{name} has a frame every {teacher.stride} samples, the student "
                    f"every {student.settings.stride}; use a teacher or a student of the same "
                    "frame rate"
                )
        shapes = teachers.shapes
        if settings.loss.agreement < 1:
            one_width(shapes, "loss.agreement")
        self.settings = settings
        self.teachers = teachers
        self.aggregate = build_aggregation(settings, shapes)
        self.target_norm: TargetNorm | None = None
        if settings.target_norm != "none":
            from .target_norm import TargetNorm

            self.target_norm = TargetNorm(shapes, settings.target_norm, settings.target_norm_steps)
        if settings.heads.kind == "layerwise":
            check_layers(self.aggregate.specs, student.settings)
        heads = PredictionHeads(student.width, self.aggregate.specs, settings.heads)
        if not settings.loss.weight:
            heads.requires_grad_(False)
        self.trainable = nn.ModuleDict({"student": student, "heads": heads})
        self.weightings = nn.ModuleList()
        if settings.targets.drop_teachers:
            self.weightings.append(TeacherDropping(settings.targets.drop_teachers, settings.loss))
        if settings.loss.agreement < 1:
            self.weightings.append(Agreement(settings.loss.agreement))
        self.terms = nn.ModuleList()
        self.unit_layers: dict[str, set[int]] = {}  # teacher -> layers that have units
        self._add_unit_losses(units)
        self.relation: RelationLoss | None = None
        if settings.relation.weight:
            from .relation import RelationLoss

            depths = {name: teacher.depth for name, teacher in teachers.items()}
            self.relation = RelationLoss(settings.relation, shapes, depths, student.settings)
            self.terms.append(self.relation)
        if settings.loss.feature_penalty:
            self.terms.append(FeaturePenalty(settings.loss.feature_penalty))
        self.sparsity: SparsityTerm | None = None
        if settings.pruning is not None:
            from .pruning.sparsity import SparsityTerm

            self.sparsity = SparsityTerm(student, settings.pruning)
            self.trainable["multipliers"] = self.sparsity.multipliers
            self.terms.append(self.sparsity)

    def _add_unit_losses(self, units: Sequence[UnitLabels]) -> None:
        """Add a head and a term for each file of units, and the mask embedding."""
        if not units:
            return
        from .unit_loss import UnitLoss, check_units, unit_names

        width, mask = self.student.width, self.settings.student.mask
        heads = nn.ModuleDict()
        names = unit_names(units)
        for i, (name, labels) in enumerate(zip(names, units, strict=True)):
            check_units(labels, self.teachers, f"unit_loss[{i}]")
            heads[name] = head = nn.Linear(width, labels.clusters)
            options = self.settings.unit_loss[i]
            label = "unit" if len(units) == 1 else f"{name}/unit"
            self.terms.append(UnitLoss(labels, head, options, mask is not None, label))
            self.unit_layers.setdefault(labels.teacher, set()).add(labels.layer)
        self.trainable["unit_heads"] = heads
        if mask is not None:
            from .span_mask import MaskEmbedding

            self.trainable["mask_embedding"] = MaskEmbedding(width)

    @property
    def student(self) -> Student:
        return cast(Student, self.trainable["student"])

    @property
    def heads(self) -> PredictionHeads:
        return cast(PredictionHeads, self.trainable["heads"])

    @property
    def highest_layer(self) -> int | None:
        """The highest of the student's layers that the loss reads; None: the encoder's output."""
        distils = self.settings.loss.weight > 0
        if (distils and self.heads.highest_layer is None) or self.unit_layers:
            return None
        layers = list(self.relation.layers) if self.relation is not None else []
        if distils and self.heads.highest_layer is not None:
            layers.append(self.heads.highest_layer)
        return max(layers)

    def forward(
        self,
        batch: DistillBatch,
        step: int = 1,
        detail: bool = False,
        counts: FrameCounts | None = None,
    ) -> tuple[Tensor, Logs]:
        """One step of distillation.

        Args:
            batch: waveforms, on the device of the distiller, and lengths, on the CPU.
            step: number of the step from 1, for teacher weights that change over time.
            detail: also log the terms of every teacher and layer.
            counts: denominators of the terms with ``loss.reduce: frames``; None: those of this
                batch.

        Returns:
            The scalar loss, and scalars for the log.
        """
        shared: Shared = {}  # conv features of a frozen extractor
        features = self.student.frozen_features(batch.waves, batch.lengths, shared)
        # teachers {teacher: [batch, layer, frame, dim]}; cached {target set: ...}, usually empty
        teachers, cached, states = self.run_teachers(batch, shared)
        # hidden states [batch, frame, dim], mask [batch, frame]
        student = self.run_student(batch, features)
        predictions = self.heads(student)  # {target set: [batch, layer, frame, width]}
        predictions, teachers, cached, valid = crop(predictions, teachers, cached, student.mask)
        mask = valid  # [batch, frame], without masked spans
        if batch.spans is not None:
            mask = valid * ~batch.spans[:, : valid.shape[1]]
        raw_teachers = teachers
        if self.target_norm is not None:
            teachers = self.target_norm(teachers, valid)
        teacher_weights = weights_at(
            self.settings.teachers, step, self.settings.targets.weight_steps
        )
        # keys and shapes of the predictions
        targets = cached or self.aggregate(teachers, teacher_weights)
        counts = counts or self.count(batch.lengths, batch.spans, cached_frames(batch))
        comparison = Comparison(
            predictions=predictions,
            targets=targets,
            mask=mask,
            valid=valid,
            teachers=teachers,
            raw_teachers=raw_teachers,
            teacher_weights=teacher_weights,
            states=states,
            student=student,
            step=step,
            counts=counts,
        )
        loss: Tensor = mask.new_zeros(())
        logs: Logs = {}
        if self.settings.loss.weight:  # else the heads are not trained
            weights = self.loss_weights(comparison)  # of frames, target sets, dimensions
            loss, logs = distillation_loss(predictions, targets, weights, self.settings.loss)
            loss = self.settings.loss.weight * loss
            logs |= weights.logs
        for term in self.terms:  # unit loss, relation, feature penalty, sparsity
            value, scalars = term(comparison)
            loss, logs = loss + value, logs | scalars
        return loss, logs | self.details(comparison) if detail else logs

    def run_teachers(
        self, batch: DistillBatch, shared: Shared | None = None
    ) -> tuple[Targets, Targets, Mapping[str, HiddenStates]]:
        """Targets by teacher, aggregated targets of a cache (else empty), and hidden states.

        ``shared``: conv features of ``batch.waves``, for teachers with the same extractor.
        """
        cached = batch.cached_targets
        if cached is not None and cached.aggregated:
            return {}, cached.values, {}
        if cached is not None:
            return cached.values, {}, self.teachers.states_among(cached.values)
        waves = batch.waves if batch.teacher_waves is None else batch.teacher_waves
        unpadded = [w[:length] for w, length in zip(waves, batch.lengths.tolist(), strict=True)]
        if waves is not batch.waves or waves.shape[1] != int(batch.lengths.max()):
            shared = None  # other waveforms, or more padding, than the student's
        states = self.teachers.states(unpadded, self.unit_layers, shared)
        return self.teachers.targets(states), {}, states

    def run_student(self, batch: DistillBatch, features: Tensor | None = None) -> StudentOutput:
        """The student's output; frames that a teacher lacks are masked.

        ``features``: see :meth:`.Student.frozen_features`.
        """
        masked = None
        if batch.spans is not None:
            embedding = cast("MaskEmbedding", self.trainable["mask_embedding"])
            masked = batch.spans, embedding.vector
        output: StudentOutput = self.student(batch.waves, batch.lengths, masked, features)
        index = torch.arange(output.mask.shape[1], device=output.mask.device)
        frames = self.frames(batch.lengths, cached_frames(batch))
        frames = frames.to(index.device, non_blocking=True)
        return output._replace(mask=output.mask * (index < frames[:, None]))

    def frames(self, lengths: Tensor, cached: Tensor | None) -> Tensor:
        """Frames that student and teachers have of each utterance, ``[batch]``, on the CPU.

        Args:
            lengths: samples, ``[batch]``, on the CPU.
            cached: frames of cached targets, ``[batch]``; None: the teachers run.
        """
        frames = [self.student.settings.frames(lengths)]
        if cached is None:
            frames += [teacher.frames(lengths) for teacher in self.teachers.values()]
        else:
            frames.append(cached.to(lengths))
        return torch.stack(frames).amin(0).clamp(min=0)

    def count(
        self, lengths: Tensor, spans: Tensor | None, cached: Tensor | None
    ) -> FrameCounts | None:
        """The frames of a batch, for the denominators of a step; None with ``loss.reduce:
        batches``.

        Args:
            lengths, cached: see :meth:`frames`.
            spans: bool ``[batch, frame]``, frames in masked spans.
        """
        if self.settings.loss.reduce == "batches":
            return None
        if not len(lengths):
            return FrameCounts()
        frames = self.frames(lengths, cached)
        valid = torch.arange(int(frames.max())) < frames[:, None]
        spans = None if spans is None else spans[:, : valid.shape[1]].cpu()
        loss, relation = self.settings.loss, self.settings.relation
        return count_frames(valid, spans, relation.window, loss.mask_padding)

    def loss_weights(self, comparison: Comparison) -> LossWeights:
        """Weights of frames, target sets and dimensions."""
        weights = LossWeights(
            frames=dict.fromkeys(comparison.targets, self._frame_weights(comparison)),
            sets=self.aggregate.set_weights(comparison.teacher_weights),
            dims=self.aggregate.dim_weights(comparison.teacher_weights),
            frame_count=comparison.counts and comparison.counts.distilled,
        )
        for weighting in self.weightings:  # teacher dropping, agreement of the teachers
            weights = weighting(weights, comparison)
        return weights

    @torch.no_grad()
    def details(self, comparison: Comparison) -> Logs:
        """Scalars for the log: distances to each teacher's layers, under any aggregation.

        They are of all dimensions, also of teachers that are dropped in this step.
        """
        logs: Logs = {} if self.target_norm is None else self.target_norm.left_out()
        if not self.settings.loss.weight:
            return logs
        loss, mask = self.settings.loss, self._frame_weights(comparison)
        count = comparison.counts and comparison.counts.distilled
        predictions = self.aggregate.per_teacher(comparison.predictions)
        for name, target in comparison.teachers.items():
            reconstruction, cosine = distillation_terms(
                predictions[name], target, mask, loss, count=count
            )
            inside = comparison.mask[:, None]  # [batch, 1, frame], without padding
            total = (target.abs().mean(-1) * inside).sum((0, 2))  # [layer]
            size = divide(total, count if count is not None and loss.mask_padding else inside.sum())
            for i, label in enumerate(self.teachers[name].labels):
                logs[f"{name}/{loss.reconstruction}_{label}"] = reconstruction[i]
                logs[f"{name}/cosine_{label}"] = cosine[i]
                logs[f"{name}/target_abs_{label}"] = size[i]
        return logs

    def empty_step(self) -> None:
        """Make the collective calls of a step, without an utterance.

        Without them, the other processes would wait in the all_gather of the target statistics.
        """
        if self.target_norm is not None:
            self.target_norm.empty_step()

    def _frame_weights(self, comparison: Comparison) -> Tensor | None:
        if self.settings.loss.mask_padding:
            return comparison.mask
        if comparison.counts is None and comparison.mask is comparison.valid:
            return None
        inside = comparison.valid - comparison.mask  # 1 in masked spans
        return 1 - inside  # 1 for padding, too


def cached_frames(batch: DistillBatch) -> Tensor | None:
    """Frames of a batch's cached targets, ``[batch]``; None without a cache."""
    return None if batch.cached_targets is None else batch.cached_targets.frames


def crop(
    predictions: Targets, teachers: Targets, cached: Targets, mask: Tensor
) -> tuple[Targets, Targets, Targets, Tensor]:
    """Crop ``[batch, layer, frame, dim]`` and ``mask [batch, frame]`` to the fewest frames."""
    groups = (predictions, teachers, cached)
    frames = min(states.shape[2] for group in groups for states in group.values())

    def first(group: Targets) -> Targets:
        return {name: states[:, :, :frames] for name, states in group.items()}

    return first(predictions), first(teachers), first(cached), mask[:, :frames]
