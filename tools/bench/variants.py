"""The variants of a distillation step that a benchmark compares."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3prl_ekd import compat
from s3prl_ekd.errors import SetupError

from .inputs import RATE, SIZES, TABLE, ModelSize
from .measure import StageTimer

OPTIMIZER = {"name": "AdamW_with_schedule", "lr": 2e-4, "warmup_proportion": 0.07}  # s3prl's
CLIPPING = 5.0  # of the gradient's norm, as in s3prl's config
UNLIMITED = 1_000_000  # samples or updates: a limit that is never reached


@dataclass(frozen=True)
class BenchPlan:
    """Inputs of a benchmark.

    Attributes:
        folder: with ``audio/``, ``tables/`` and the teachers' checkpoints.
        size: a key of :data:`SIZES`.
        batch: utterances in a batch.
    """

    folder: Path
    teachers: Mapping[str, Path]
    size: str
    device: str
    batch: int

    @property
    def models(self) -> ModelSize:
        return SIZES[self.size]


def bench_config(plan: BenchPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model config and ``datarc`` of a benchmark: random teachers, a student of random weights,
    whole utterances."""
    teachers = {
        name: {"model": str(path), "layers": list(plan.models.layers)}
        for name, path in plan.teachers.items()
    }
    model = {"teachers": teachers, "student": plan.models.student, "init": {"teacher": None}}
    data = {
        "libri_root": str(plan.folder / "audio"),
        "file_path": str(plan.folder / "tables"),
        "sets": [TABLE],
        "train_batch_size": plan.batch,
        "num_workers": 0,
        "sequence_length": 0,
    }
    return model, data


class EkdVariant:
    """The step of ``run_pretrain.py -u ekd`` with the default optimizer, in float32.

    Args:
        plan: inputs.
        cached: read the targets from a cache of ``s3prl-ekd cache`` and run no teacher.
        frozen: the student's conv extractor is that of the first teacher and is not trained; the
            other teachers have extractors of their own.
        model: further keys of the model config.
    """

    def __init__(self, plan: BenchPlan, cached: bool = False, frozen: bool = False, **model: Any):
        from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert

        base, data = bench_config(plan)
        config = {"teacher_precision": "float32", **base, **model}
        if frozen:
            config["init"] = {"teacher": next(iter(plan.teachers)), "encoder": False}
            config["student"] = {**plan.models.student, "train_extractor": False}
        if cached:
            data["target_cache"] = str(build_cache(plan, config, data))
        torch.manual_seed(0)
        self.expert = UpstreamPretrainExpert(data, config, plan.device).to(plan.device).train()
        self.dataset = self.expert.get_train_dataloader().dataset
        from s3prl_ekd.pretrain.optim import fused_adamw

        self.optimizer: Any = fused_adamw(self.expert.model, {**OPTIMIZER, "lr": 1e-5})

    def step(self, index: int, timer: StageTimer) -> tuple[float, float]:
        """Take a training step on batch ``index`` (0: the longest).

        Returns:
            (loss, seconds of audio).
        """
        distiller = self.expert.distiller
        with (
            timer.method(distiller.teachers, "states", "teacher forward"),
            timer.method(distiller.teachers, "targets", "teacher forward"),
            timer.method(distiller.student, "frozen_features", "student forward"),
            timer.method(distiller.student, "forward", "student forward"),
            timer.method(distiller.heads, "forward", "student forward"),
        ):
            with timer("data"):  # includes reading cached targets
                batch = self.dataset[index]
            with timer("loss"):
                loss, _ = self.expert(batch, defaultdict(list), global_step=index + 1)
        _update(loss, self.optimizer, self.expert.model, timer)
        return float(loss.detach()), float(batch.lengths.sum()) / RATE


class S3prlVariant:
    """s3prl's distiller with K teachers in place of one, otherwise unchanged.

    Upstream experts get lists of waveforms; everything is in train mode and float32. Buckets,
    model (one prediction head for each target), loss (over all frames) and optimizer (over all
    parameters, those of the frozen teachers included) are s3prl's.
    """

    def __init__(self, plan: BenchPlan):
        compat.apply()
        import torchaudio
        from s3prl.pretrain.bucket_dataset import WaveDataset
        from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

        from s3prl_ekd.distill.student_settings import StudentSettings
        from s3prl_ekd.teachers import load_upstream

        self.load, self.device, self.layers = torchaudio.load, plan.device, plan.models.layers
        with contextlib.redirect_stdout(io.StringIO()):
            # s3prl halves batches with an utterance above the sequence length; avoid that.
            self.buckets = WaveDataset(
                {"sequence_length": UNLIMITED},
                plan.batch,
                str(plan.folder / "tables"),
                [TABLE],
                libri_root=str(plan.folder / "audio"),
            )
        teachers: dict[str, Any] = {
            name: load_upstream(str(path), name) for name, path in plan.teachers.items()
        }
        for teacher in teachers.values():  # as in s3prl: a dropped layer gives no hidden state
            teacher.model.encoder.layerdrop = 0
        self.teachers = nn.ModuleDict(teachers).requires_grad_(False)
        config = {
            **vars(StudentSettings(**plan.models.student)),
            "task_emb_type": "expand-last",
            "out_layer_type": "expand-last",
            "n_tasks": len(plan.teachers) * len(self.layers),
            "pred_layer_id": self.layers * len(plan.teachers),
            "final_dim": plan.models.teacher.get("embed_dim", 96),
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.distiller = DistillerModel(DistillerConfig(config))
        self.model = nn.ModuleDict({"teachers": self.teachers, "distiller": self.distiller})
        self.model.to(plan.device).train()
        self.optimizer = _optimizer(self.model)

    def step(self, index: int, timer: StageTimer) -> tuple[float, float]:
        """See :meth:`EkdVariant.step`."""
        with timer("data"):
            waves, padded, mask = self.read(self.buckets.X[index])
        with timer("student forward"):
            _, _, predictions, _ = self.distiller(padded, mask)  # [batch, target, frame, dim]
        with timer("teacher forward"), torch.no_grad():
            states = [teacher(waves)["hidden_states"] for teacher in self.teachers.values()]
            targets = torch.stack([s[layer] for s in states for layer in self.layers], dim=1)
        with timer("loss"):
            cosine = torch.cosine_similarity(predictions, targets, dim=-1)
            loss = (predictions - targets).abs().mean() - nn.functional.logsigmoid(cosine).mean()
        del states, targets
        _update(loss, self.optimizer, self.model, timer)
        return float(loss.detach()), sum(map(len, waves)) / RATE

    def read(self, files: list[str]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Read files as s3prl's dataset does.

        Returns:
            Waveforms ``[sample]``; padded waveforms and their mask, both ``[batch, sample]``.
        """
        root = Path(self.buckets.libri_root)
        waves = [self.load(str(root / file))[0].squeeze(0) for file in files]
        pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
        padded, mask = pad(waves), pad([torch.ones_like(wave) for wave in waves])
        device = self.device
        return [wave.to(device) for wave in waves], padded.to(device), mask.to(device)


# All others are compared with the first.
VARIANTS: dict[str, Callable[[BenchPlan], Any]] = {
    "s3prl": S3prlVariant,
    "ekd": EkdVariant,
    "ekd-bf16-teachers": functools.partial(EkdVariant, teacher_precision="bfloat16"),
    "ekd-compile": functools.partial(EkdVariant, teacher_compile=True),
    "ekd-cached": functools.partial(EkdVariant, cached=True),
    "ekd-frozen": functools.partial(EkdVariant, frozen=True),
    "ekd-cached-frozen": functools.partial(EkdVariant, cached=True, frozen=True),
}


def copy_weights(ekd: EkdVariant, s3prl: S3prlVariant) -> None:
    """Copy the weights of student and heads from ``ekd`` to ``s3prl``."""
    backbone = ekd.expert.distiller.student.backbone.state_dict()
    heads = [head.net for head in ekd.expert.distiller.heads.values()]
    layer = s3prl.distiller.output_layer
    with torch.no_grad():
        for name, tensor in s3prl.distiller.state_dict().items():
            if name in backbone:
                tensor.copy_(backbone[name])
        layer[0].weight.copy_(torch.cat([net[0].weight for net in heads]))
        layer[0].bias.copy_(torch.cat([net[0].bias for net in heads]))
        layer[2].weight.copy_(torch.cat([net[2].weight for net in heads]))
        layer[2].bias.copy_(torch.cat([net[2].bias for net in heads], dim=2))


def build_cache(plan: BenchPlan, config: dict, data: dict, dtype: str = "float16") -> Path:
    """Build ``folder/targets_DTYPE`` with ``s3prl-ekd cache`` if it does not exist."""
    cache = plan.folder / f"targets_{dtype}"
    if cache.exists():
        return cache
    run = {"total_steps": 2, "log_step": 1, "save_step": 1, "n_epochs": -1, "max_keep": 1}
    run |= {"gradient_clipping": 5, "gradient_accumulate_steps": 1}
    runner = {"runner": run, "optimizer": OPTIMIZER, "pretrain_expert": {"datarc": data}}
    for name, contents in (("runner.yaml", runner), ("model.yaml", config)):
        (plan.folder / name).write_text(json.dumps(contents))  # JSON is YAML
    argv = ["cache", "-c", "runner.yaml", "-g", "model.yaml", "-o", cache.name, "--dtype", dtype]
    argv = [sys.executable, "-m", "s3prl_ekd", *argv, "--device", plan.device]
    result = subprocess.run(argv, cwd=plan.folder, capture_output=True, text=True)
    if result.returncode:
        raise SetupError(f"s3prl-ekd cache failed: {result.stderr.strip().splitlines()[-1]}")
    return cache


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    from s3prl.optimizers import get_optimizer

    return get_optimizer([model], UNLIMITED, OPTIMIZER)


def _update(
    loss: Tensor, optimizer: torch.optim.Optimizer, model: nn.Module, timer: StageTimer
) -> None:
    with timer("backward"):
        loss.backward()
    with timer("optimizer"):
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
