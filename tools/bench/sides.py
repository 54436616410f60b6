"""The two ways of a distillation step that a benchmark compares, and room for more.

Each is asked for one step at a time; its weights follow from the seed and the teachers' files, so
that all start from the same.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distill.batch import DistillBatch
from ..teachers.random_weights import SIZES, Size
from .bench_clock import Clock
from .bench_corpus import RATE, SET

OPTIMIZER = {"name": "AdamW_with_schedule", "lr": 2e-4, "warmup_proportion": 0.07}  # s3prl's
_CLIPPING = 5.0  # of the gradient's norm, as in s3prl's config
_MANY = 1_000_000  # samples or updates: more than there are


@dataclass(frozen=True)
class Plan:
    """What is measured: the ``folder`` has ``audio/``, ``tables/`` and the teachers' files."""

    folder: Path
    teachers: Mapping[str, Path]
    size: str
    device: str
    batch: int
    distort: bool = False

    @property
    def models(self) -> Size:
        return SIZES[self.size]


class Side(Protocol):
    """One way to make a step."""

    def __len__(self) -> int:
        """How many batches there are."""

    def step(self, index: int, clock: Clock) -> tuple[float, Tensor]:
        """One step on batch ``index``: the loss, and the lengths of its utterances in samples."""


class Ours:
    """The distiller as ``run_pretrain.py -u ekd`` makes it.

    Args:
        plan: what is measured.
        settings: of the experiment, beside teachers and student.
    """

    def __init__(self, plan: Plan, **settings: Any):
        from ..data.batches import train_loader
        from ..data.distortion.settings import DistortionSettings
        from ..data.settings import DataSettings
        from ..distill.distiller import EnsembleDistiller
        from ..distill.settings import DistillSettings, TeacherSettings
        from ..distill.student import Student
        from ..teachers import load_teachers

        models = plan.models
        teachers = {n: TeacherSettings(str(p), models.layers) for n, p in plan.teachers.items()}
        chosen = DistillSettings(teachers, student=models.student, **settings)
        self.dataset = train_loader(
            DataSettings(
                str(plan.folder / "audio"),
                str(plan.folder / "tables"),
                (SET,),
                plan.batch,
                num_workers=0,
                sequence_length=0,
            ),
            [SET],
            min_samples=models.student.min_samples,
            distortion=DistortionSettings(setup="same") if plan.distort else None,
        ).dataset
        torch.manual_seed(0)
        loaded = load_teachers(
            chosen.teachers,
            chosen.teacher_dropout,
            chosen.teacher_path,
            chosen.teacher_precision,
            chosen.teacher_compile,
        )
        self.device = plan.device
        self.distiller = EnsembleDistiller(loaded, Student(models.student), chosen)
        self.distiller.to(plan.device).train()
        self.optimizer = _optimizer(self.distiller.trainable)

    def __len__(self) -> int:
        return len(self.dataset)

    def step(self, index: int, clock: Clock) -> tuple[float, Tensor]:
        distiller = self.distiller
        with (
            _charged(self.dataset, "_distort", "distort", clock),
            _charged(distiller.teachers, "states", "teacher forward", clock),
            _charged(distiller.teachers, "targets", "teacher forward", clock),
            _charged(distiller.student, "forward", "student forward", clock),
            _charged(distiller.heads, "forward", "student forward", clock),
        ):
            with clock("read and decode"):
                batch = self.dataset[index]
                waves, lengths = batch.waves.to(self.device), batch.lengths.to(self.device)
                heard = batch.teacher_waves
                heard = None if heard is None else heard.to(self.device)
            with clock("loss"):
                loss, _ = distiller(DistillBatch(waves, lengths, heard), step=index + 1)
        _update(loss, self.optimizer, distiller.trainable, clock)
        return float(loss.detach()), batch.lengths

    def difference(self) -> dict[str, float]:
        """How far the targets are from those of s3prl's experts in eval mode and float32.

        Returns:
            Over the first batch and all teachers, the ``largest`` absolute difference, and the mean
            one as a ``share`` of the mean absolute value.
        """
        batch, ensemble = self.dataset[0], self.distiller.teachers
        waves = [w[:n].to(self.device) for w, n in zip(batch.waves, batch.lengths, strict=True)]
        ours = ensemble(waves)
        encoders = {name: teacher.encoder for name, teacher in ensemble.items()}
        for teacher in ensemble.values():
            teacher.encoder = None
        theirs = ensemble(waves)
        for name, encoder in encoders.items():
            ensemble[name].encoder = encoder
        apart = {name: (ours[name] - theirs[name]).abs() for name in ours}
        shares = [float(apart[name].mean() / theirs[name].abs().mean()) for name in apart]
        largest = max(float(each.max()) for each in apart.values())
        return {"largest": largest, "share": sum(shares) / len(shares)}


class Baseline:
    """s3prl's distiller with K teachers in the place of one, and nothing else changed.

    Upstream experts on lists of waveforms, everything in train mode and float32, s3prl's buckets
    of a fixed number of utterances, its model with as many prediction heads as there are targets,
    its loss over all frames, its optimizer over all parameters, the teachers' too.
    """

    def __init__(self, plan: Plan):
        import torchaudio
        from s3prl.pretrain.bucket_dataset import WaveDataset
        from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

        from ..teachers import load_upstream

        models = plan.models
        with contextlib.redirect_stdout(io.StringIO()):
            # A sequence length that none has: without one, s3prl halves batches of long ones.
            self.buckets = WaveDataset(
                {"sequence_length": _MANY},
                plan.batch,
                str(plan.folder / "tables"),
                [SET],
                libri_root=str(plan.folder / "audio"),
            )
        self.read = torchaudio.load
        self.device = plan.device
        self.layers = models.layers
        self.model = nn.Module()
        self.model.teachers = nn.ModuleDict(
            {name: load_upstream(str(path), name) for name, path in plan.teachers.items()}
        ).requires_grad_(False)
        tasks = len(plan.teachers) * len(models.layers)
        config = {
            **vars(models.student),
            "task_emb_type": "expand-last",
            "out_layer_type": "expand-last",
            "n_tasks": tasks,
            "pred_layer_id": models.layers * len(plan.teachers),
            "final_dim": models.width,
        }
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model.distiller = DistillerModel(DistillerConfig(config))
        self.model.to(plan.device).train()
        self.optimizer = _optimizer(self.model)

    def __len__(self) -> int:
        return len(self.buckets)

    def step(self, index: int, clock: Clock) -> tuple[float, Tensor]:
        with clock("read and decode"):
            waves, each, lengths, mask = self._batch(self.buckets.X[index])
        with clock("student forward"):
            _, _, predictions, _ = self.model.distiller(waves, mask)  # [batch, target, frame, dim]
        with clock("teacher forward"), torch.no_grad():
            states = [teacher(each)["hidden_states"] for teacher in self.model.teachers.values()]
            targets = torch.stack([s[layer] for s in states for layer in self.layers], dim=1)
        with clock("loss"):
            l1 = (predictions - targets).abs().mean()
            cosine = torch.cosine_similarity(predictions, targets, dim=-1)
            loss = l1 - nn.functional.logsigmoid(cosine).mean()
        del states, targets
        _update(loss, self.optimizer, self.model, clock)
        return float(loss.detach()), lengths

    def _batch(self, files: list[str]) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """As s3prl's dataset makes it: waveforms padded and apart, lengths, a mask of samples."""
        root = Path(self.buckets.libri_root)
        each = [self.read(str(root / file))[0].squeeze() for file in files]
        lengths = torch.tensor([len(wave) for wave in each])
        padded = nn.utils.rnn.pad_sequence(each, batch_first=True)
        mask = torch.ones(padded.shape)
        for row, length in enumerate(lengths):
            mask[row, length:] = 0
        device = self.device
        return padded.to(device), [wave.to(device) for wave in each], lengths, mask.to(device)


def cached(plan: Plan, **settings: Any) -> Side:
    """Ours with stored targets: :class:`.bench_cached.Cached`, which is built on this module."""
    from .bench_cached import Cached

    return Cached(plan, **settings)


# What can be measured: a name for the table -> what makes it from a plan. The first is what the
# others are compared with.
SIDES: dict[str, Callable[[Plan], Side]] = {
    "baseline": Baseline,
    "ours": Ours,
    "ours-bf16": functools.partial(Ours, teacher_precision="bfloat16"),
    "ours-compile": functools.partial(Ours, teacher_compile=True),
    "ours-cached": cached,
}


def copy_weights(ours: Ours, baseline: Baseline) -> None:
    """Give the baseline's student and heads the weights of ours: the same model, laid out once."""
    backbone = ours.distiller.student.backbone.state_dict()
    heads = [head.net for head in ours.distiller.heads.values()]
    layer = baseline.model.distiller.output_layer
    with torch.no_grad():
        for name, tensor in baseline.model.distiller.state_dict().items():
            if name in backbone:
                tensor.copy_(backbone[name])
        layer[0].weight.copy_(torch.cat([net[0].weight for net in heads]))
        layer[0].bias.copy_(torch.cat([net[0].bias for net in heads]))
        layer[2].weight.copy_(torch.cat([net[2].weight for net in heads]))
        layer[2].bias.copy_(torch.cat([net[2].bias for net in heads], dim=2))


@contextlib.contextmanager
def _charged(owner: Any, name: str, stage: str, clock: Clock):
    """Charge a method's calls to a stage, for as long as the block lasts."""
    setattr(owner, name, clock.wrap(stage, getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)  # the class has its own still


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    from s3prl.optimizers import get_optimizer

    return get_optimizer([model], _MANY, OPTIMIZER)


def _update(loss: Tensor, optimizer: torch.optim.Optimizer, model: nn.Module, clock: Clock) -> None:
    with clock("backward"):
        loss.backward()
    with clock("optimizer"):
        nn.utils.clip_grad_norm_(model.parameters(), _CLIPPING)
        optimizer.step()
        optimizer.zero_grad()


def padding_share(lengths: list[Tensor]) -> float:
    """The share of samples that are padding, over batches of these lengths."""
    padded = sum(len(batch) * int(batch.max()) for batch in lengths)
    return 1 - sum(int(batch.sum()) for batch in lengths) / padded


def audio_seconds(lengths: Tensor) -> float:
    """Seconds of sound in a batch, without its padding."""
    return int(lengths.sum()) / RATE
