"""The YAML files of ``run_pretrain.py -u ekd`` as checked, frozen dataclasses. Loads no torch.

``config_model.yaml`` (``-g``) is the method: :class:`ModelFile`.
``config_runner.yaml`` (``-c``) is the run: :class:`RunnerFile`; its keys are s3prl's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compat.no_eval import check_names
from ..data.distortion.settings import DistortionSettings
from ..data.settings import DataSettings
from ..distill.settings import DistillSettings, check_size
from ..files.config import apply_overrides, build, read_extended, read_yaml

FUSED_ADAMW = "FusedAdamW"
KEYS = ("name", "lr", "weight_decay", "betas", "eps", "warmup_proportion")


def check_fused_adamw(config: Mapping[str, Any]) -> None:
    """Refuse what is no setting of it.

    Raises:
        ValueError: naming the key.
    """
    for key, value in config.items():
        if key not in KEYS:
            raise ValueError(
                f"optimizer.{key}: {FUSED_ADAMW} has no such setting; use {', '.join(KEYS[1:])}"
            )
        if key == "betas":
            known = isinstance(value, list) and len(value) == 2
            if not known or not all(type(b) in (int, float) and 0 <= b < 1 for b in value):
                raise ValueError(
                    f"optimizer.betas is {value!r}; two numbers from 0 to 1 are needed"
                )
        elif key not in ("name", "lr"):
            if type(value) not in (int, float) or value < 0:
                raise ValueError(f"optimizer.{key} is {value!r}; a number of 0 or more is expected")
    if config.get("warmup_proportion", 0) > 1:
        raise ValueError("optimizer.warmup_proportion is more than 1, which is all of the steps")


# The names that s3prl's get_optimizer knows.
OPTIMIZERS = (
    "AdamW_with_schedule",
    "BertAdam_with_schedule",
    "Lamb_with_schedule",
    "Adam",
    "AdamW",
    "TorchOptim",
    FUSED_ADAMW,  # ours
)


@dataclass(frozen=True)
class RunSettings:
    """``runner``: s3prl's pretraining Runner insists on each of these but ``fp16``. Ours:

    ``max_keep`` counts the checkpoints of every ``save_step``. ``last_minutes``: time between two
    writings of ``last.ckpt``; 0 leaves it to ``save_step`` and to what interrupts the run.
    ``eval_step``: updates between two looks at ``dev_sets``; None takes ``save_step``.
    ``max_nonfinite``: updates in a row that may be skipped because loss or gradient is not finite.
    ``bf16``: the student in bfloat16 where that is safe (autocast, on a CUDA device); targets and
    loss stay float32. ``compile``: the student through ``torch.compile``. ``recompute``: activation
    checkpointing, less memory for a second forward of the student.
    """

    total_steps: int
    log_step: int
    save_step: int
    n_epochs: int
    gradient_clipping: float
    gradient_accumulate_steps: int
    max_keep: int
    fp16: bool = False
    last_minutes: float = 15.0
    eval_step: int | None = None
    max_nonfinite: int = 20
    bf16: bool = False
    compile: bool = False
    recompute: bool = False

    def __post_init__(self):
        for name in (
            "total_steps",
            "log_step",
            "save_step",
            "gradient_accumulate_steps",
            "max_keep",
            "eval_step",
            "max_nonfinite",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; 1 or more is allowed")
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both true; choose one")
        if self.last_minutes < 0:
            raise ValueError(f"last_minutes is {self.last_minutes}; 0 or more is allowed")
        if self.n_epochs > 0:
            # s3prl counts steps by it, but builds the learning rate from total_steps
            raise ValueError(f"n_epochs is {self.n_epochs}; put -1 and say total_steps")
        for name in ("log_step", "save_step"):  # s3prl's Runner asserts these two
            if self.total_steps <= getattr(self, name):
                raise ValueError(
                    f"total_steps ({self.total_steps}) must be greater than {name} "
                    f"({getattr(self, name)})"
                )


@dataclass(frozen=True)
class ExpertSettings:
    datarc: DataSettings


@dataclass(frozen=True)
class RunnerFile:
    """``config_runner.yaml``. ``optimizer`` and ``scheduler`` go to s3prl as they are."""

    runner: RunSettings
    optimizer: dict[str, Any] = field(default_factory=dict)
    pretrain_expert: ExpertSettings | None = None
    scheduler: dict[str, Any] | None = None

    def __post_init__(self):
        if self.pretrain_expert is None:
            raise ValueError("the key pretrain_expert is missing")
        if self.runner.eval_step is not None and not self.pretrain_expert.datarc.dev_sets:
            raise ValueError(
                "runner.eval_step is set and there is nothing to measure on: name tables in "
                "pretrain_expert.datarc.dev_sets"
            )
        if not isinstance(self.optimizer.get("name"), str):
            raise ValueError("optimizer.name is missing; for example AdamW_with_schedule")
        if "lr" not in self.optimizer:
            raise ValueError("optimizer.lr is missing; for example 2.e-4")
        if self.optimizer["name"] not in OPTIMIZERS:
            raise ValueError(
                f"optimizer.name is {self.optimizer['name']!r}; use one of: {', '.join(OPTIMIZERS)}"
            )
        if self.optimizer["name"] == FUSED_ADAMW:
            check_fused_adamw(self.optimizer)
        for key, value in self.optimizer.items():
            if key not in ("name", "torch_optim_name") and isinstance(value, str):
                raise ValueError(
                    f"optimizer.{key} is the text {value!r}; a number is expected, with a point: "
                    "2.e-4 and not 2e-4"
                )
        rate = self.optimizer["lr"]
        if type(rate) not in (int, float) or rate <= 0:
            raise ValueError(f"optimizer.lr is {rate!r}; a number above 0 is expected")


@dataclass(frozen=True)
class ModelFile(DistillSettings):
    """``config_model.yaml``: the method, and what is done to the waveforms before it."""

    distortion: DistortionSettings = field(default_factory=DistortionSettings)

    def __post_init__(self):
        super().__post_init__()
        check_size(self.student)


def load_model_config(source: str | Path | dict) -> ModelFile:
    """Check a model config: a YAML path (it may extend another), or the dict of a checkpoint.

    Raises:
        ConfigError: naming the file and the YAML path of the first thing that is not valid.
    """
    if not isinstance(source, (str, Path)):
        return build(ModelFile, source, "the checkpoint's Upstream_Config")
    return build(ModelFile, read_extended(source), str(source))


def load_runner_config(path: str | Path, overrides: str | None = None) -> RunnerFile:
    """Check a runner config as s3prl will see it, with the ``-o`` overrides put in.

    Raises:
        ConfigError: naming the file and the YAML path of the first thing that is not valid.
    """
    data = read_yaml(path)
    if overrides:
        data = apply_overrides(data, overrides)
    return check_runner_config(data, str(path))


def check_runner_config(data: dict, where: str) -> RunnerFile:
    """Check a runner config that was read already, for example a checkpoint's.

    Raises:
        ConfigError: naming ``where`` and the YAML path of the first thing that is not valid.
    """
    check_names(data, where)
    return build(RunnerFile, data, where)


def load_data_config(datarc: dict) -> DataSettings:
    """Check ``pretrain_expert.datarc`` alone, for runs started by s3prl's plain script."""
    return build(DataSettings, datarc, "pretrain_expert.datarc")
