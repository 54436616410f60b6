"""Ensemble distillation behind the interface of s3prl's pretrain Runner.

s3prl imports ``pretrain.ekd.pretrain_expert.UpstreamPretrainExpert``. Its ``pretrain/runner.py``
calls the methods of the interface.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .. import __version__, compat
from ..errors import CheckpointError, ConfigError, DataError, SetupError, first_line

compat.apply()

from ..data.batch import Batch  # noqa: E402
from ..data.batches import train_loader  # noqa: E402
from ..data.loader import BatchLoader  # noqa: E402
from ..distill.aggregation import describe_targets  # noqa: E402
from ..distill.distiller import EnsembleDistiller  # noqa: E402
from ..distill.frame_counts import FrameCounts  # noqa: E402
from ..distill.initialisation import initialise  # noqa: E402
from ..distill.student import Student  # noqa: E402
from ..distill.student_settings import (  # noqa: E402
    ConvInput,
    CopySettings,
    FileSettings,
    StudentSettings,
)
from ..files.config import to_plain_data  # noqa: E402
from ..files.weights_digest import weights_digest  # noqa: E402
from ..student_file import (  # noqa: E402
    RUN_KEY,
    LoadedStudent,
    architecture,
    contents,
    load_student,
    read_architecture,
    require_cut,
)
from ..system.precision import DTYPES  # noqa: E402
from ..teachers import (  # noqa: E402
    choose_teacher_precision,
    copied_student,
    load_teachers,
    teacher_model,
)
from ..teachers.names import pin_teachers  # noqa: E402
from .distributed import distiller_batch, empty_step  # noqa: E402
from .optim import add_to_s3prl  # noqa: E402
from .settings import (  # noqa: E402
    RunSettings,
    check_activation_checkpointing,
    load_data_config,
    load_model_config,
)

if TYPE_CHECKING:
    from ..distill.span_mask import SpanMask
    from ..distill.teachers import TeacherEnsemble
    from ..essence.units import Units
    from ..hidden_states.store import TargetReader
    from .tensorboard import ScalarWriter

logger = logging.getLogger(__name__)

MULTI_GPU = (
    "ekd does not support --multi_gpu (DataParallel); leave it out, and for several GPUs type: "
    "torchrun --standalone --nproc_per_node=gpu -m s3prl_ekd run_pretrain.py -u ekd -n NAME"
)


class UpstreamPretrainExpert(nn.Module):
    """Teachers, student, heads and data loaders of a run.

    Args:
        datarc: ``pretrain_expert.datarc`` of the runner config.
        upstream_config: path of the model config, or the model config of a checkpoint.
        multi_gpu: must be false; DataParallel is not supported.
    """

    def __init__(
        self,
        datarc: dict[str, Any],
        upstream_config: str | dict[str, Any],
        device: str = "cuda",
        multi_gpu: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        if multi_gpu:
            raise SetupError(MULTI_GPU)
        self.device = device
        self.settings = load_model_config(upstream_config)
        teachers_of_run = pin_teachers(self.settings.teachers)  # checkpoints keep the commits
        self.settings = dataclasses.replace(self.settings, teachers=teachers_of_run)
        self.data = load_data_config(datarc)
        student = self._student_before_teachers()
        self.targets: TargetReader | None = None
        if self.data.target_cache is not None:
            from .target_cache import use

            self.targets = use.open_targets(self.data.target_cache, self.settings)
        self._choose_teacher_precision()
        self.precision: str | None = None  # of the student; set by prepare()
        add_to_s3prl()
        self.seed = torch.initial_seed()  # set by s3prl's script
        conv: ConvInput = cast(CopySettings, self.settings.student)
        conv = conv if student is None else student.settings
        self._min_samples, mask = conv.min_samples, self.settings.student.mask
        self._span_mask: SpanMask | None = None
        if mask is not None:
            from ..distill.span_mask import SpanMask

            self._span_mask = SpanMask(mask, conv)
        self.dataloader = self._loader(self.data.sets)
        self.loaders, self.dev_dataloader = [self.dataloader], None
        if self.data.dev_sets:
            self.dev_dataloader = self._loader(self.data.dev_sets, shuffle=False)
            self.loaders.append(self.dev_dataloader)
        if mask is not None:
            self._check_mask_length(mask.length, conv)
        is_new = not isinstance(upstream_config, dict)  # else it is that of a checkpoint
        units = self._load_units()
        teachers = load_teachers(
            self.settings.teachers,
            self.settings.teacher_dropout,
            self.settings.teacher_backend,
            self.settings.teacher_precision,
            self.settings.teacher_compile,
            self.settings.teacher_masked_norm,
        )
        for name, teacher in teachers.items():
            if 0 < self.data.sequence_length < teacher.field:
                raise ConfigError(
                    f"pretrain_expert.datarc.sequence_length: {self.data.sequence_length} samples "
                    f"are shorter than a frame of teachers.{name}, {teacher.field}; raise it"
                )
        if is_new:
            self._check_units(units, teachers)
        if student is None:
            copy = cast(CopySettings, self.settings.student)
            student = copied_student(teachers, copy, self.settings.pruning)
        if self.targets is not None:
            use.check_unit_layers(units, self.settings)
            batches = [batch for loader in self.loaders for batch in loader.dataset.batches]
            rows = [row for batch in batches for row in batch]
            use.check_cache(self.targets, teachers, self.settings, self.data, rows)
        self.distiller = EnsembleDistiller(teachers, student, self.settings, units)
        self._teacher_digests: dict[str, str] = {}
        if not isinstance(self.settings.student, StudentSettings):
            self._teacher_digests = {
                name: weights_digest(teacher.upstream) for name, teacher in teachers.items()
            }
        if self._heads_of_file is not None:
            from .heads_of_file import load_heads

            load_heads(self.distiller, self._heads_of_file, self._teacher_digests)
        init = self.settings.init
        if init.sources:
            models = [teacher_model(teachers, name) for name in init.sources]
            parts = {"conv": init.conv, "encoder": init.encoder}
            initialise(student, models, **parts, layers=init.layers, same=is_new)
        # for `s3prl-ekd merge`
        self._initial_weights: Any = weights_digest(self.distiller.student)
        self._log_setup()
        if self.targets is not None:
            use.free_teachers(teachers)

    def _choose_teacher_precision(self) -> None:
        """Resolve ``teacher_precision: auto`` in the settings, which checkpoints keep."""
        precision: Any
        if self.targets is None:
            precision, reason = choose_teacher_precision(self.settings, str(self.device))
            logger.info("precision of fast teachers: %s (%s)", precision, reason)
        elif (precision := self.settings.teacher_precision) == "auto":
            precision = self.targets.index.key["teacher_precision"]
            slow = self.settings.teacher_backend == "s3prl" or self.settings.teacher_dropout
            precision = precision if precision in DTYPES and not slow else "float32"
        self.settings = dataclasses.replace(self.settings, teacher_precision=precision)

    def _load_units(self) -> list[Units]:
        """Read the files of ``unit_loss``. Raises CheckpointError if one is missing or damaged."""
        if not self.settings.unit_loss:
            return []
        from ..essence.units import load_units

        return [load_units(unit_loss.file) for unit_loss in self.settings.unit_loss]

    def _check_units(self, units: Sequence[Units], teachers: TeacherEnsemble) -> None:
        """Raise ConfigError if a new run's units are of another model than its teacher."""
        for i, labels in enumerate(units):
            from ..essence.units import check_teacher_of_units

            if labels.teacher in teachers:  # an unknown teacher is refused later
                model = self.settings.teachers[labels.teacher].model
                upstream = teachers[labels.teacher].upstream
                check_teacher_of_units(labels, model, upstream, f"unit_loss[{i}].file")

    def _check_mask_length(self, length: int, conv: ConvInput) -> None:
        """Raise ConfigError if no utterance is as long as a masked span."""
        frames = conv.frames(self.dataloader.dataset.longest)
        if length > frames:
            raise ConfigError(
                f"student.mask.length: {length} frames, but the longest utterance or excerpt has "
                f"{frames}; nothing would be masked, so lower it"
            )

    def _student_before_teachers(self) -> Student | None:
        """The student, unless it is a copy of a teacher, which has to be loaded first."""
        settings = self.settings.student
        self._heads_of_file: LoadedStudent | None = None
        self._pruned: Any = None  # how the student of a file was pruned
        if isinstance(settings, StudentSettings):
            # `mask` and `train_extractor` are for training only: not part of the student's file
            scale = settings.feature_grad_mult if settings.train_extractor else 0.0
            settings = dataclasses.replace(
                settings, mask=None, train_extractor=True, feature_grad_mult=scale
            )
            return Student(settings, self.settings.student_backend)
        if isinstance(settings, CopySettings):
            return None
        loaded = load_student(settings.file)
        require_cut(loaded.student, settings.file)
        self._pruned = loaded.about.get("pruned")
        if settings.keep_heads:
            if loaded.heads is None:
                raise CheckpointError(
                    f"student.file: {settings.file} has no prediction heads; set "
                    "student.keep_heads: false to start with new ones"
                )
            self._heads_of_file = loaded
        if not settings.train_extractor:
            loaded.student.freeze_extractor()
        elif loaded.student.settings.feature_grad_mult == 0:
            logger.warning(
                "student.file: the conv extractor of %s stays frozen (feature_grad_mult: 0)",
                settings.file,
            )
        return loaded.student.train()

    @property
    def model(self) -> nn.ModuleDict:
        """The trained modules, which the Runner optimises and clips: student and heads."""
        return self.distiller.trainable

    def prepare(self, run: RunSettings) -> None:
        """Apply the run's settings to the student before the first step."""
        self.precision = run.precision
        student = self.distiller.student
        check_activation_checkpointing(self.settings, run)
        student.activation_checkpointing = run.activation_checkpointing
        if run.compile:
            if run.activation_checkpointing:
                import torch._dynamo

                # In older versions DDPOptimizer cannot split graphs with activation checkpointing.
                torch._dynamo.config.optimize_ddp = False
            student.compile(dynamic=True)

    def count(self, batch: Batch) -> FrameCounts | None:
        """The frames of a batch; see :meth:`.EnsembleDistiller.count`."""
        cached = None if batch.targets is None else batch.targets.frames
        return self.distiller.count(batch.lengths, batch.spans, cached)

    @property
    def target_norm_batches(self) -> int:
        """Batches in the running target statistics, which the forward pass updates."""
        target_norm = self.distiller.target_norm
        return 0 if target_norm is None else target_norm.batches

    def _loader(self, sets: Sequence[str], shuffle: bool = True) -> BatchLoader:
        return train_loader(
            self.data,
            sets,
            min_samples=self._min_samples,
            distortion=self.settings.distortion,
            seed=self.seed,
            shuffle=shuffle,
            targets=self.targets,
            span_mask=self._span_mask,
            pin_memory=str(self.device).startswith("cuda"),
        )

    def close(self) -> None:
        """End the loaders' worker processes."""
        for loader in self.loaders:
            loader.close()

    def _log_setup(self) -> None:
        """Log teachers, aggregation, heads, distortion, student and device."""
        settings = self.settings
        for name, teacher in self.distiller.teachers.items():
            layers = f"{' '.join(teacher.labels)} of {teacher.depth} layers, width {teacher.width}"
            size = f"{_count(teacher) / 1e6:.1f} M parameters, frozen"
            mode = "dropout on" if settings.teacher_dropout else "eval mode"
            path = settings.teachers[name].model
            logger.info("teacher %s: %s, %s, %s, %s", name, path, layers, size, mode)
        heads = describe_targets(self.distiller.aggregate.specs)
        logger.info("aggregation %s; prediction heads: %s", settings.aggregation, heads)
        if self.targets is not None:
            cache = f"{self.targets.folder}, {self.targets.index.dtype}"
            made_in = self.targets.index.key["teacher_precision"]
            logger.info(
                "targets: cached in %s, computed in %s; the teachers do not run", cache, made_in
            )
        if settings.distortion.setup != "clean":
            logger.info("distortion: %s", settings.distortion.setup)
        source = " and ".join(settings.init.sources) or "random weights"
        if isinstance(settings.student, CopySettings):
            source = f"all of {settings.student.of}"
        elif isinstance(settings.student, FileSettings):
            source = settings.student.file
        logger.info(
            "student: %s parameters, with heads %s (%s trained), initialised from %s; device %s",
            f"{_count(self.distiller.student):,}",
            f"{_count(self.model):,}",
            f"{sum(p.numel() for p in self.model.parameters() if p.requires_grad):,}",
            source,
            self.device,
        )
        depth = self.distiller.student.settings.encoder_layers
        highest = self.distiller.highest_layer
        if highest is not None and highest < depth:
            logger.warning(
                "no term of the loss reads the student's layers %d to %d, so they learn nothing "
                "from the teachers",
                highest + 1,
                depth,
            )
        if (sparsity := self.distiller.sparsity) is not None:
            logger.info(
                "pruning: gates of %s; target: remove %.1f %% of %s %s",
                ", ".join(sparsity.pruning.units),
                100 * sparsity.pruning.sparsity,
                f"{sparsity.full:,.0f}",
                "parameters" if sparsity.pruning.by == "parameters" else "MACs",
            )

    # s3prl's interface

    def get_train_dataloader(self) -> BatchLoader:
        return self.dataloader

    def forward(
        self,
        data: Batch,
        records: Mapping[str, list[Tensor]],
        global_step: int = 0,
        log_step: int = 1000,
    ) -> tuple[Tensor, Mapping[str, list[Tensor]]]:
        """Compute the loss of one batch and append its scalars to ``records``.

        For s3prl's own Runner; :class:`.trainer.Trainer` calls the distiller directly. The loss is
        a mean over the batch: this Runner averages over batches and does not use ``loss.reduce``.
        """
        if self.settings.pruning is not None:
            raise SetupError(
                "pruning needs the optimizer of s3prl_ekd; start the run with: run_pretrain.py -u "
                "ekd, of this package"
            )
        if data.problem:
            raise DataError(data.problem)
        for bad in data.bad:
            logger.warning("left out %s: %s", bad.path, bad.reason)
        if not data.names:
            return empty_step(self.distiller), records
        batch, detail = distiller_batch(data, self.device), global_step % log_step == 0
        loss, logs = self.distiller(batch, step=global_step, detail=detail)
        records["loss_mean"].append(loss.detach())
        for name, value in logs.items():
            records[name].append(value)  # a tensor, because float() would synchronise the device
        return loss, records

    def log_records(
        self,
        records: Mapping[str, list[Tensor]],
        logger: ScalarWriter,
        prefix: str,
        global_step: int,
        **kwargs: Any,
    ) -> None:
        """Write the mean over the log window of each recorded scalar to TensorBoard."""
        for name, values in records.items():
            # Scalars of a checkpoint are on the CPU, later ones on the device.
            mean = torch.stack([value.float().cpu() for value in values]).mean().item()
            logger.add_scalar(f"{prefix}{name}", mean, global_step=global_step)

    def on_before_zero_grad(self) -> None:
        """Do nothing; part of the interface."""

    def add_state_to_save(self, all_states: dict) -> dict:
        """Add the student, its heads and the model config to s3prl's checkpoint.

        The config goes under ``Upstream_Config``, where the Runner reads it on resume. (s3prl's
        distiller stores it in ``Config``, and so its runs cannot be resumed.)
        """
        about: dict[str, Any] = {
            "made_by": f"s3prl_ekd {__version__}",
            "config": to_plain_data(self.settings),
            "data": {  # without paths, which are private
                "sets": list(self.data.sets),
                "train_batch_size": self.data.train_batch_size,
                "max_seconds": self.data.max_seconds,
            },
            "step": all_states["Step"] + 1,
        }
        if self._teacher_digests:
            about["teachers"] = self._teacher_digests
        run, optimizer = all_states["Config"]["runner"], all_states["Config"]["optimizer"]
        # s3prl's own Runner does not call prepare(), and trains by this key
        about["precision"] = self.precision or ("float16" if run.get("fp16") else "float32")
        if self.settings.pruning is not None:  # for the second distillation
            about["run"] = {"total_steps": run["total_steps"], "save_step": run["save_step"]}
            about["run"]["lr"] = optimizer["lr"]
        if self._pruned:
            about["pruned"] = self._pruned
        if isinstance(self._initial_weights, str):
            about["initial_weights"] = self._initial_weights
        heads = self.distiller.heads if self.settings.loss.weight else None  # else not trained
        all_states[RUN_KEY] = contents(
            self.distiller.student, heads, self.distiller.aggregate.specs, about
        )
        all_states["Upstream_Config"] = to_plain_data(self.settings)
        for key, part in self._optional_parts().items():
            all_states[key] = part.state_dict()
        # The Runner increments the step after saving. Without the 1 a resumed run would repeat
        # the last step.
        all_states["Step"] += 1
        return all_states

    def load_model(self, all_states: dict) -> None:
        """Load weights and target statistics from a checkpoint.

        Raises CheckpointError if some are missing or do not fit.
        """
        try:
            saved = all_states[RUN_KEY]
            student = architecture(read_architecture(saved["settings"], "the checkpoint's student"))
            own = architecture(self.distiller.student.settings)
            if student != own:
                from ..files.config_diff import config_differences, describe_changes

                sizes = config_differences(student, own)
                if isinstance(self.settings.student, FileSettings):
                    raise CheckpointError(
                        f"student.file {self.settings.student.file} has changed since this run "
                        f"began: {describe_changes(sizes)} (then -> now); restore it"
                    )
                raise CheckpointError(
                    "the checkpoint's student has another architecture: "
                    f"{describe_changes(sizes)} (checkpoint -> this run); start a new run under "
                    "another name"
                )
            self.distiller.student.load_state_dict(saved["student"])
            if self.settings.loss.weight:
                self.distiller.heads.load_state_dict(saved["heads"])
            # absent in runs of version 0.1, whose teachers may have changed since
            self._initial_weights = saved["about"].get("initial_weights")
            for key, part in self._optional_parts().items():
                state = all_states[key]
                if key == "UnitHead" and "weight" in state:  # of version 0.1, which had one
                    (name,) = cast(nn.ModuleDict, part).keys()
                    state = {f"{name}.{field}": value for field, value in state.items()}
                part.load_state_dict(state)
            # The position in the data follows from the step; s3prl's own Runner does not save it.
            accumulate = all_states["Config"]["runner"]["gradient_accumulate_steps"]
            sampler = self.dataloader.sampler
            sampler.epoch, sampler.position = divmod(all_states["Step"] * accumulate, len(sampler))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            problem = f"the checkpoint does not fit this run: {first_line(error)}"
            raise CheckpointError(problem) from None

    def _optional_parts(self) -> dict[str, nn.Module]:
        """The modules that not every run has, by their key in a checkpoint."""
        parts: dict[str, nn.Module] = {}
        if self.distiller.target_norm is not None:
            parts["Standardiser"] = self.distiller.target_norm
        for key, name in (
            ("UnitHead", "unit_heads"),
            ("MaskEmbedding", "mask_embedding"),
            ("Multipliers", "multipliers"),
        ):
            if name in self.distiller.trainable:
                parts[key] = self.distiller.trainable[name]
        return parts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
