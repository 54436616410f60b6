"""Essence KD of ASR models inside s3prl's own downstream training.

The Runner, the expert, its data, optimizer, evaluation and files are s3prl's. Hooks on the modules
that the Runner built add the teachers: one keeps the waveforms of a batch, one the student's
logits, and one puts the multitask loss in the place of the CTC loss.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..compat.isinstance import isinstance_kept
from ..downstream.run import own_folder
from ..files.atomic import atomic_saves
from ..files.config import plain
from .asr import AsrEnsemble, common_frames
from .selection import Selection, select, soft_label_loss

logger = logging.getLogger(__name__)


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

    def __post_init__(self):
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

    def _keep_waves(self, module, args: tuple) -> None:
        self.waves = args[0]

    def _keep_logits(self, module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.logits, self.lengths = output

    def _replace_loss(self, module, args: tuple, kwargs: dict, ctc: Tensor) -> Tensor | None:
        logits, lengths, waves = self.logits, self.lengths, self.waves
        self.logits, self.waves = None, ()  # a graph kept here would live through the evaluation
        if args[0] != self.train_split:
            return None
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

    def _log(self, split: str, records: dict, logger: Any, global_step: int, **rest) -> Any:
        """s3prl's own log, after our scalars went to TensorBoard beside its ``asr/train-loss``."""
        for key in [key for key in records if key.startswith("essence/")]:
            mean = torch.stack(records.pop(key)).float().mean().item()
            tag = f"asr/{split}-{key.removeprefix('essence/')}"
            logger.add_scalar(tag, mean, global_step=global_step)
        return self.log_records(
            split, records=records, logger=logger, global_step=global_step, **rest
        )


def distil_asr(
    script: ModuleType, argv: Sequence[str], ensemble: AsrEnsemble, settings: EssenceSettings
) -> Namespace:
    """Call s3prl's ``run_downstream`` for a training run, with the teachers in its loss.

    Args:
        script: the module ``run_downstream``.
        argv: its arguments, ``-m train`` among them.
        ensemble: the teachers. They exist before the script sets its seeds, so that a run with
            ``alpha`` 1 draws the numbers that a run of s3prl alone draws.
        settings: kept under ``essence`` in the checkpoint's ``Config``.

    Returns:
        The arguments as s3prl completed them.
    """
    make_runner, argv_before = script.Runner, sys.argv
    seen: dict[str, Namespace] = {}

    def make_runner_with_teachers(args: Namespace, config: dict):
        config["essence"] = plain(settings)
        runner = make_runner(args, config)
        train_split = config["runner"].get("train_dataloader", "train")
        MultitaskLoss(runner, ensemble.to(args.device), settings, train_split)
        seen["args"] = args
        return runner

    script.Runner, sys.argv = make_runner_with_teachers, [f"{script.__name__}.py", *argv]
    try:
        with own_folder(argv), atomic_saves(), isinstance_kept():
            script.main()
    finally:
        script.Runner, sys.argv = make_runner, argv_before
    return seen["args"]
