"""Essence KD of ASR models inside s3prl's own downstream training (Yang et al. 2019, 1906.10834).

Finished ``-d asr`` runs of s3prl are the teachers: waveforms in, posteriors of each frame out. The
Runner, the expert, its data, optimizer, evaluation and files are s3prl's. Hooks on the modules that
the Runner built add the teachers: one keeps the waveforms of a batch, one the student's logits, and
one replaces the CTC loss by the multitask loss.
"""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..compat.replaced import replaced
from ..downstream.run import downstream_guards
from ..errors import CheckpointError, TeacherError, first_line
from ..files.config import plain
from ..files.run_checkpoints import newest, read_run
from ..request import DownstreamRequest
from .selection import Selection, select, soft_label_loss

if TYPE_CHECKING:
    from s3prl.downstream.asr.expert import DownstreamExpert

logger = logging.getLogger(__name__)

MODELS = ("RNNs", "Wav2Letter")  # the acoustic models of s3prl's asr expert


class AsrTeacher(nn.Module):
    """One finished ASR model, frozen, without dropout.

    Args:
        upstream: maps a list of waveforms to a dict with hidden states.
        featurizer: s3prl's Featurizer with the run's layer weights.
        expert: s3prl's asr DownstreamExpert with the run's weights.
        name: what messages call it.
    """

    def __init__(
        self, upstream: nn.Module, featurizer: nn.Module, expert: DownstreamExpert, name: str
    ):
        super().__init__()
        self.upstream, self.featurizer, self.expert, self.name = upstream, featurizer, expert, name
        self.requires_grad_(False).eval()

    @property
    def symbols(self) -> list[str]:
        """The dictionary: what each class stands for."""
        return list(self.expert.dictionary.symbols)

    def train(self, mode: bool = True) -> AsrTeacher:
        """Stay in eval mode, whatever holds this teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Waveforms ``[sample]`` at 16 kHz -> ``[batch, frame, class]``, lengths ``[batch]``."""
        features = self.featurizer(list(waves), self.upstream(list(waves)))
        lengths = torch.tensor([len(feature) for feature in features], dtype=torch.int32)
        padded = pad_sequence(features, batch_first=True)  # [batch, frame, dim]
        logits, lengths = self.expert.model(self.expert.projector(padded), lengths)
        return logits.float().softmax(-1), lengths


class AsrEnsemble(nn.ModuleList):
    """The mean of the teachers' posteriors, each weighing the same (*ours*; the paper's abstract
    says ensemble and no more).

    Raises:
        TeacherError: no teacher, or two with different dictionaries.
    """

    def __init__(self, teachers: Sequence[AsrTeacher]):
        super().__init__(teachers)
        if not teachers:
            raise TeacherError("name at least one teacher")
        for teacher in teachers[1:]:
            self.check_symbols(teacher.symbols, teacher.name)

    def __iter__(self) -> Iterator[AsrTeacher]:
        return cast(Iterator[AsrTeacher], super().__iter__())

    @property
    def first(self) -> AsrTeacher:
        """One of the teachers, where any will do."""
        return next(iter(self))

    def check_symbols(self, symbols: Sequence[str], name: str) -> None:
        """Raise TeacherError unless ``symbols`` is the dictionary of the teachers."""
        first = self.first
        if list(symbols) != first.symbols:
            raise TeacherError(
                f"{name} has another dictionary ({len(symbols)} symbols) than the teacher "
                f"{first.name} ({len(first.symbols)} symbols); use the same dict_path for all"
            )

    @torch.no_grad()
    def forward(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Waveforms ``[sample]`` at 16 kHz -> mean posteriors ``[batch, frame, class]`` and the
        number of frames that all teachers have, ``[batch]``.

        Raises:
            TeacherError: the frame counts of an utterance differ by more than one.
        """
        with torch.autocast(waves[0].device.type, enabled=False):  # these are the targets
            outputs = [teacher(waves) for teacher in self]

        lengths = common_frames([(t.name, n) for t, (_, n) in zip(self, outputs, strict=True)])
        frames = min(posteriors.shape[1] for posteriors, _ in outputs)
        return torch.stack([p[:, :frames] for p, _ in outputs]).mean(0), lengths


def common_frames(lengths: Sequence[tuple[str, Tensor]]) -> Tensor:
    """The smallest frame count of each utterance, ``[batch]``, over models of the same rate.

    Each model is its name and its counts ``[batch]``. Upstreams round the number of frames up or
    down; a difference of one is cropped.

    Raises:
        TeacherError: the counts differ by more than one.
    """
    stacked = torch.stack([n.cpu().long() for _, n in lengths])  # [model, batch]
    low, high = stacked.min(0).values, stacked.max(0).values
    if (high - low).max() > 1:
        worst = int((high - low).argmax())
        counts = ", ".join(f"{name}: {int(n[worst])}" for name, n in lengths)
        raise TeacherError(
            f"the models have different frame rates (frames of the same utterance: {counts}); use "
            "upstreams of one rate and the same modelrc.*.total_rate"
        )
    return low


def load_asr_teacher(path: str | Path) -> AsrTeacher:
    """Rebuild a finished run with s3prl's own classes, on the CPU.

    Needs ``compat.apply()`` and ``registration.register()`` before. Paths in the run's arguments
    and config (upstream checkpoint, dictionary) are looked up from the working folder, as s3prl
    does.

    Args:
        path: a checkpoint, or a run's folder: its ``dev-clean-best.ckpt``, else the newest one.

    Raises:
        CheckpointError: no checkpoint of ``-d asr``, or something it needs is not there.
    """
    path = checkpoint_in(Path(path))
    states = read_run(path)
    args, config = copy.copy(states["Args"]), copy.deepcopy(states["Config"])
    if getattr(args, "downstream", None) != "asr" or not {"Featurizer", "Downstream"} <= set(
        states
    ):
        raise CheckpointError(f"{path} is no checkpoint of run_downstream.py -d asr")
    _check(args, config, path)
    # What s3prl reads of them to build a model that is only listened to.
    args.init_ckpt, args.device = str(path), "cpu"
    config["downstream_expert"]["datarc"]["decoder_args"] = {"decoder_type": "None"}
    from s3prl.downstream.runner import Runner

    try:
        runner = Runner(args, config)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} cannot be rebuilt as an ASR model: {first_line(error)}"
        ) from None
    parts = (runner.upstream.model, runner.featurizer.model, runner.downstream.model)
    return AsrTeacher(*parts, name=str(path))


def checkpoint_in(path: Path) -> Path:
    """A run's folder -> the checkpoint to take; a file is left as it is.

    Raises:
        CheckpointError: the folder has none.
    """
    if not path.is_dir():
        return path
    best = path / "dev-clean-best.ckpt"  # s3prl writes it once WER is below 100
    found = best if best.is_file() else newest(path)
    if found is None:
        raise CheckpointError(f"there are no checkpoints (states-*.ckpt) in {path}")
    return found


def _check(args: Namespace, config: dict, path: Path) -> None:
    """Whatever in a run's arguments would end in a traceback or have s3prl evaluate a text."""
    from s3prl import hub

    from ..teachers.checkpoint import check_upstream_file

    if getattr(args, "from_hf_hub", False):
        raise CheckpointError(f"{path}: upstreams from the Hugging Face Hub (--hub) bring code")
    name = str(getattr(args, "upstream", None))
    if name.startswith("_") or not callable(getattr(hub, name, None)):
        raise CheckpointError(f"{path}: s3prl.hub has no upstream {name}")
    source = getattr(args, "upstream_ckpt", None)
    if source and "://" not in str(source) and not Path(source).is_file():
        raise CheckpointError(
            f"{path}: its upstream {name} was read from {source}, which is not there; start from "
            "the folder where it was trained"
        )
    if source and Path(source).is_file():
        check_upstream_file(Path(source), name)
    try:
        expert = config["downstream_expert"]
        select, dictionary = expert["modelrc"]["select"], expert["datarc"].get("dict_path")
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} has no configuration of -d asr in it") from None
    if select not in MODELS:  # s3prl evaluates this text
        raise CheckpointError(
            f"{path}: modelrc.select is {select!r}; use one of: {', '.join(MODELS)}"
        )
    if dictionary is not None and not Path(dictionary).is_file():
        raise CheckpointError(
            f"{path}: its dictionary is {dictionary}, which is not there; start from the folder "
            "where it was trained"
        )


@dataclass(frozen=True)
class EssenceSettings:
    """Teachers, what of them is distilled, and the weight of the labels.

    The loss is ``alpha`` · CTC + (1 − ``alpha``) · cross-entropy against the selected posteriors
    (*paper*: a multitask loss of selected soft outputs and hard labels; the weight of a half and
    CTC as the loss of the labels are *ours*). CTC is a mean over labels and the other over frames.

    Raises:
        ValueError: ``alpha`` is not between 0 and 1.
    """

    teachers: tuple[str, ...]
    selection: Selection = field(default_factory=Selection)
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; 0 (teachers only) to 1 (labels only)")


class MultitaskLoss:
    """Hooks on one Runner's student. With ``alpha`` 1 they leave every number as it is.

    Args:
        runner: s3prl's downstream Runner, with an asr expert.
        ensemble: the teachers, on the Runner's device.
        settings: selection and weight.
        train_split: the split whose loss is replaced; others are evaluation.
    """

    def __init__(
        self, runner: Any, ensemble: AsrEnsemble, settings: EssenceSettings, train_split: str
    ):
        self.ensemble, self.settings, self.train_split = ensemble, settings, train_split
        self.waves: Sequence[Tensor] = ()
        self.logits: Tensor | None = None
        self.lengths: Tensor | None = None
        expert = runner.downstream.model
        self.log_records = expert.log_records
        ensemble.check_symbols(expert.dictionary.symbols, "the student")
        if settings.alpha == 1:
            return  # plain CTC: the teachers need not be asked
        runner.featurizer.model.register_forward_pre_hook(self._keep_waves)
        expert.model.register_forward_hook(self._keep_logits)
        expert.register_forward_hook(self._replace_loss, with_kwargs=True)
        expert.log_records = self._log

    def _keep_waves(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.waves = args[0]

    def _keep_logits(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> None:
        self.logits, self.lengths = output

    def _replace_loss(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ctc: Tensor
    ) -> Tensor | None:
        logits, lengths, waves = self.logits, self.lengths, self.waves
        self.logits, self.waves = None, ()  # a graph kept here would live through the evaluation
        if args[0] != self.train_split:
            return None
        assert logits is not None and lengths is not None  # the model has run before its loss
        soft, scalars = self.soft_loss(waves, logits, lengths)
        alpha = self.settings.alpha
        # Not 0 times CTC: that is no number where the CTC loss is infinite (zero_infinity off).
        total = soft if alpha == 0 else alpha * ctc + (1 - alpha) * soft
        for name, value in {**scalars, "soft_loss": soft, "total_loss": total}.items():
            kwargs["records"][f"essence/{name}"].append(value.detach())
        return total

    def soft_loss(
        self, waves: Sequence[Tensor], logits: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss against the teachers for a batch, and what the selection left.

        Args:
            waves: waveforms ``[sample]`` at 16 kHz.
            logits: the student's, ``[batch, frame, class]``.
            lengths: valid frames of the student, ``[batch]``.

        Raises:
            TeacherError: student and teachers differ by more than one frame.
        """
        posteriors, available = self.ensemble(waves)
        frames = min(posteriors.shape[1], logits.shape[1])
        valid = common_frames([("teachers", available), ("student", lengths)])
        mask = torch.arange(frames)[None] < valid[:, None]  # [batch, frame]
        mask = mask.to(logits.device)
        chosen = select(posteriors[:, :frames], self.settings.selection)
        keep = chosen.keep & mask
        log_probs = logits[:, :frames].float().log_softmax(-1)
        loss = soft_label_loss(log_probs, chosen.posteriors, keep)
        count = keep.sum().clamp(min=1)
        classes = (chosen.posteriors > 0).sum(-1)
        return loss, {
            "frames_kept": keep.sum() / mask.sum().clamp(min=1),
            "mass_kept": (chosen.mass * keep).sum() / count,
            "classes_kept": (classes * keep).sum() / count,
        }

    def _log(
        self, split: str, records: dict[str, Any], logger: Any, global_step: int, **rest: Any
    ) -> Any:
        """s3prl's own log, after our scalars went to TensorBoard beside its ``asr/train-loss``."""
        for key in [key for key in records if key.startswith("essence/")]:
            mean = torch.stack(records.pop(key)).float().mean().item()
            tag = f"asr/{split}-{key.removeprefix('essence/')}"
            logger.add_scalar(tag, mean, global_step=global_step)
        return self.log_records(
            split, records=records, logger=logger, global_step=global_step, **rest
        )


def distil_asr(
    script: Any,
    request: DownstreamRequest,
    ensemble: AsrEnsemble,
    settings: EssenceSettings,
) -> Namespace:
    """Call s3prl's ``run_downstream`` for a training run, with the teachers in its loss.

    Args:
        script: the module ``run_downstream``.
        request: the training, checked.
        ensemble: the teachers. They exist before the script sets its seeds, so that a run with
            ``alpha`` 1 draws the numbers that a run of s3prl alone draws.
        settings: kept under ``essence`` in the checkpoint's ``Config``.

    Returns:
        The arguments as s3prl completed them.
    """
    make_runner = script.Runner
    seen: dict[str, Namespace] = {}

    def make_runner_with_teachers(args: Namespace, config: dict[str, Any]) -> Any:
        config["essence"] = plain(settings)
        runner = make_runner(args, config)
        train_split = config["runner"].get("train_dataloader", "train")
        MultitaskLoss(runner, ensemble.to(args.device), settings, train_split)
        seen["args"] = args
        return runner

    with downstream_guards(request), replaced(script, "Runner", make_runner_with_teachers):
        script.main()
    return seen["args"]
