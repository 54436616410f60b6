"""The two YAML files of ``run_pretrain.py -u ekd`` as frozen dataclasses; needs no torch.

``config_model.yaml`` (``-g``) has the method: :class:`ModelFile`.
``config_runner.yaml`` (``-c``) has the run: :class:`RunnerFile`; its keys are s3prl's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..compat.no_eval import reject_code
from ..data.distortion.settings import DistortionSettings
from ..data.settings import DataSettings
from ..distill.ranges import check_range
from ..distill.settings import DistillSettings
from ..distill.student_settings import StudentSettings, check_size
from ..errors import ConfigError
from ..files.config import apply_overrides, from_plain_data, read_extended, read_yaml
from ..files.renamed_keys import (
    MODEL,
    RUNNER,
    list_units,
    rename_keys,
    rename_overrides,
    warn_renamed,
)

logger = logging.getLogger(__name__)

FUSED_ADAMW = "FusedAdamW"
KEYS = ("name", "lr", "weight_decay", "betas", "eps", "warmup_proportion")


def check_fused_adamw(config: Mapping[str, Any]) -> None:
    """Check the ``optimizer`` mapping of FusedAdamW.

    Raises:
        ValueError: a key is unknown or its value is invalid.
    """
    for key, value in config.items():
        if key not in KEYS:
            raise ValueError(
                f"optimizer.{key}: unknown key of {FUSED_ADAMW}; use {', '.join(KEYS[1:])}"
            )
        if key == "betas":
            pair = isinstance(value, list) and len(value) == 2
            if not pair or not all(type(b) in (int, float) and 0 <= b < 1 for b in value):
                raise ValueError(
                    f"optimizer.betas must be two numbers from 0 to below 1, got {value!r}"
                )
        elif key not in ("name", "lr"):
            if type(value) not in (int, float) or value < 0:
                raise ValueError(f"optimizer.{key} must be a number of 0 or more, got {value!r}")
    if config.get("warmup_proportion", 0) > 1:
        raise ValueError("optimizer.warmup_proportion must be at most 1")


# Optimizers of s3prl's get_optimizer, and ours.
OPTIMIZERS = (
    "AdamW_with_schedule",
    "BertAdam_with_schedule",
    "Lamb_with_schedule",
    "Adam",
    "AdamW",
    "TorchOptim",
    FUSED_ADAMW,
)


@dataclass(frozen=True)
class RunSettings:
    """The training run. The keys without "(ours)" are those of s3prl's pretraining Runner."""

    total_steps: int
    """Optimizer steps of the whole run."""

    log_step: int
    """Steps between two points in TensorBoard."""

    save_step: int
    """Steps between two checkpoints ``states-STEP.ckpt``."""

    n_epochs: int
    """-1; s3prl requires the key, but ``total_steps`` sets the length of a run."""

    gradient_clipping: float
    """Largest norm of the gradient."""

    gradient_accumulate_steps: int
    """Batches per step."""

    max_keep: int
    """How many checkpoints ``states-STEP.ckpt`` are kept; the oldest are removed."""

    autosave_minutes: float = 15.0
    """Minutes between two saves of ``last.ckpt``; 0: only at ``save_step`` and on interruption
    (ours)."""

    eval_step: int | None = None
    """Steps between two measurements of the loss on ``dev_sets``; null: ``save_step`` (ours)."""

    max_nonfinite: int = 20
    """Stop after this many steps in a row whose loss or gradient was not finite (ours)."""

    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Precision of the student's forward (ours; s3prl's ``fp16: true`` is ``float16``). ``auto``:
    bfloat16 on GPUs from Ampere on and on CPUs with AMX, float32 elsewhere. ``bfloat16`` and
    ``float16`` (CUDA only, with loss scaling) are autocast: weights, targets and loss stay float32.
    On CUDA, what stays float32 may use TF32 products, except with ``float32``, which is exact;
    ``tf32`` is float32 with them. The precision of a run is chosen at its start and saved in its
    checkpoints. Teachers: ``teacher_precision`` of the model config."""

    compile: bool = False
    """Compile the student with ``torch.compile`` (ours)."""

    activation_checkpointing: bool = False
    """Recompute the activations of the student's transformer layers in the backward pass, to save
    memory (ours)."""

    def __post_init__(self):
        check_range(self, 1, math.inf, "total_steps", "log_step", "save_step", "eval_step")
        check_range(self, 1, math.inf, "gradient_accumulate_steps", "max_keep", "max_nonfinite")
        check_range(self, 0, math.inf, "autosave_minutes")
        if self.gradient_clipping <= 0:
            raise ValueError(f"gradient_clipping must be above 0, got {self.gradient_clipping}")
        if self.n_epochs > 0:
            # s3prl would count steps by n_epochs but schedule the learning rate by total_steps
            raise ValueError(
                f"n_epochs must not be above 0 (-1 is usual), got {self.n_epochs}; set total_steps"
            )
        for name in ("log_step", "save_step"):  # s3prl's Runner asserts these two
            if self.total_steps <= getattr(self, name):
                raise ValueError(
                    f"total_steps ({self.total_steps}) must be greater than {name} "
                    f"({getattr(self, name)})"
                )


# What these optimizers of s3prl use; they ignore all other arguments.
USED_KEYS = {
    "Adam": {"lr"},
    "AdamW": {"lr"},
    "BertAdam_with_schedule": {"lr", "warmup_proportion"},
}


@dataclass(frozen=True)
class ExpertSettings:
    """Settings of the pretrain expert."""

    datarc: DataSettings
    """The training data."""


@dataclass(frozen=True)
class RunnerFile:
    """``config_runner.yaml`` (``-c``)."""

    runner: RunSettings
    """The training run."""

    optimizer: dict[str, Any] = field(default_factory=dict)
    """``name``, ``lr`` and the arguments of the optimizer: one of s3prl's, or ``FusedAdamW`` (ours:
    torch's fused AdamW with a linear warm-up and decay). s3prl's ``Adam`` and ``AdamW`` use ``lr``
    alone, ``BertAdam_with_schedule`` also ``warmup_proportion``; others are an error. Its
    ``*_with_schedule`` ignore ``weight_decay``: always 0.01 on weights and 0 on biases."""

    pretrain_expert: ExpertSettings = field(kw_only=True)
    """Settings of the pretrain expert."""

    scheduler: dict[str, Any] | None = None
    """Learning-rate scheduler of s3prl, to which it is passed unchanged; null: none."""

    def __post_init__(self):
        if self.runner.eval_step is not None and not self.pretrain_expert.datarc.dev_sets:
            raise ValueError(
                "runner.eval_step needs pretrain_expert.datarc.dev_sets, the tables to measure the "
                "loss on"
            )
        if not isinstance(self.optimizer.get("name"), str):
            raise ValueError(f"the key optimizer.name is missing; for example: {FUSED_ADAMW}")
        if self.optimizer["name"] not in OPTIMIZERS:
            raise ValueError(
                f"optimizer.name: unknown optimizer {self.optimizer['name']!r}; use one of: "
                f"{', '.join(OPTIMIZERS)}"
            )
        if self.optimizer["name"] == FUSED_ADAMW:
            check_fused_adamw(self.optimizer)
        for key, value in self.optimizer.items():
            if key not in ("name", "torch_optim_name") and isinstance(value, str):
                raise ValueError(
                    f"optimizer.{key}: expected a number, got the text {value!r}; YAML needs a "
                    "point in it: 2.e-4, not 2e-4"
                )
        rate = self.optimizer.get("lr")
        if type(rate) not in (int, float) or rate <= 0:
            raise ValueError(f"optimizer.lr must be a number above 0 such as 2.e-4, got {rate!r}")


@dataclass(frozen=True)
class ModelFile(DistillSettings):
    """``config_model.yaml`` (``-g``)."""

    distortion: DistortionSettings = field(default_factory=DistortionSettings)
    """Distortion of the input of student and teachers; off by default."""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.student, StudentSettings):
            check_size(self.student)


def load_model_config(source: str | Path | dict) -> ModelFile:
    """Read and check a model config.

    Args:
        source: path of a YAML file, which may extend another, or ``Upstream_Config`` of a
            checkpoint.

    Raises:
        ConfigError: with the file and the YAML path of the first invalid value.
    """
    if not isinstance(source, (str, Path)):
        where = "the checkpoint's Upstream_Config"
        data = _without_groups(list_units(rename_keys(source, MODEL)), where)
        if isinstance(data, dict) and isinstance(data.get("loss"), dict):
            # the default of version 0.1
            data["loss"] = {"reduce": "batches", **data["loss"]}
        return from_plain_data(ModelFile, data, where)
    data = _without_groups(read_model_yaml(source), str(source), warn=True)
    settings = from_plain_data(ModelFile, data, str(source))
    try:
        settings.check_new()
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    if settings.without_effect:
        keys = ", ".join(settings.without_effect)
        logger.warning("%s: without effect, as other settings switch it off: %s", source, keys)
    return settings


def _without_groups(data: Any, where: str, warn: bool = False) -> Any:
    """Replace ``aggregation: groups`` of version 0.1, which is ``separate`` with groups of layers.

    Raises:
        ConfigError: a teacher has no groups.
    """
    if not isinstance(data, dict) or data.get("aggregation") != "groups":
        return data
    teachers = data.get("teachers")
    for name, teacher in teachers.items() if isinstance(teachers, dict) else ():
        if isinstance(teacher, dict) and teacher.get("groups") is None:
            raise ConfigError(
                f"{where}: aggregation: groups needs teachers.{name}.groups; write them, let "
                "s3prl-ekd group-layers find them, or use aggregation: separate"
            )
    if warn:
        warn_renamed(where, "aggregation: groups", "aggregation: separate")
    return {**data, "aggregation": "separate"}


def check_activation_checkpointing(model: ModelFile, run: RunSettings) -> None:
    """Raise ConfigError if the student's forward has no activation checkpointing."""
    if run.activation_checkpointing and model.student_backend == "s3prl":
        raise ConfigError("runner.activation_checkpointing: true needs student_backend: ours")


def check_pruning_run(model: ModelFile, run: RunnerFile) -> None:
    """Check that a run can prune the student; warn if it ends before the target is reached.

    Raises:
        ConfigError: the optimizer has one learning rate for all weights.
    """
    name = run.optimizer["name"]
    if model.pruning is not None and name != FUSED_ADAMW:
        raise ConfigError(
            f"pruning needs optimizer.name: {FUSED_ADAMW} in the runner config (-c), got {name}: "
            "gates and Lagrange multipliers have their own learning rate"
        )
    if model.pruning is not None and model.pruning.reach_at >= run.runner.total_steps:
        logger.warning(
            "the run ends before the target sparsity is reached: runner.total_steps is %d, "
            "pruning.reach_at %d",
            run.runner.total_steps,
            model.pruning.reach_at,
        )


def read_model_yaml(path: str | Path) -> dict[str, Any]:
    """Read a model config as plain data, merged with the file it extends; do not check it.

    Raises:
        ConfigError: a file cannot be read or has both the old and the new name of a key.
    """
    return list_units(read_extended(path, lambda data, path: rename_keys(data, MODEL, path)))


def load_runner_config(path: str | Path, overrides: str | None = None) -> RunnerFile:
    """Read and check a runner config with the overrides of ``-o``.

    Raises:
        ConfigError: with the file and the YAML path of the first invalid value.
    """
    data = rename_keys(read_yaml(path), RUNNER, str(path))
    if overrides:
        data = apply_overrides(data, rename_overrides(overrides))
    settings = check_runner_config(data, str(path))
    name = settings.optimizer["name"]
    ignored = settings.optimizer.keys() - {"name"} - USED_KEYS.get(name, settings.optimizer.keys())
    if ignored:  # not an error in a checkpoint, whose run began so
        raise ConfigError(
            f"{path}: optimizer: s3prl's {name} ignores {', '.join(sorted(ignored))}; remove what "
            f"is ignored, or use {FUSED_ADAMW}"
        )
    if settings.scheduler and "warmup_proportion" in settings.optimizer:
        if settings.optimizer["name"] == FUSED_ADAMW:  # earlier checkpoints may have both
            raise ConfigError(
                f"{path}: optimizer.warmup_proportion has no effect with a scheduler; remove one "
                "of them"
            )
    return settings


def saved_runner_config(data: dict) -> dict:
    """The runner config in a checkpoint, with new keys and ``precision``, which version 0.1 had
    only as ``fp16`` and ``bf16``."""
    data = rename_keys(data, RUNNER)
    if isinstance(data.get("runner"), dict):
        data["runner"].setdefault("precision", "float32")
    return data


def check_runner_config(data: dict, where: str) -> RunnerFile:
    """Check a runner config that was read before, for example the one in a checkpoint.

    Raises:
        ConfigError: with ``where`` and the YAML path of the first invalid value.
    """
    reject_code(data, where)
    return from_plain_data(RunnerFile, rename_keys(data, RUNNER), where)


def load_data_config(datarc: dict) -> DataSettings:
    """Check ``pretrain_expert.datarc`` alone, for runs started by s3prl's own script."""
    return from_plain_data(DataSettings, datarc, "pretrain_expert.datarc")
