"""Essence KD of ASR models in s3prl's downstream training (Yang et al. 2019, arXiv 1906.10834).

The teachers are finished ``-d asr`` runs of s3prl: they map waveforms to frame posteriors. Runner,
expert, data, optimizer, evaluation and files are s3prl's. Hooks on the Runner's modules add the
teachers: one stores the waveforms of a batch, one stores the student's logits, and one replaces the
CTC loss by the multitask loss.
"""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..downstream.resume import check_upstream_unchanged
from ..downstream.run import ESSENCE, check_upstream_paths, run
from ..errors import CheckpointError, ConfigError, TeacherError, first_line
from ..files.atomic import file_sha256
from ..files.config import to_plain_data
from ..files.config_diff import config_differences, describe_changes
from ..files.hub import parse_hub_id
from ..files.run_checkpoints import newest_checkpoint, read_checkpoint
from ..request import DownstreamRequest
from .selection import PosteriorSelection, select_posteriors, soft_label_loss

if TYPE_CHECKING:
    from s3prl.downstream.asr.expert import DownstreamExpert

logger = logging.getLogger(__name__)

MODELS = ("RNNs", "Wav2Letter")  # the acoustic models of s3prl's asr expert


class AsrTeacher(nn.Module):
    """A finished ASR model, frozen, without dropout: s3prl's upstream, Featurizer and asr expert
    with the run's weights. ``name`` is used in messages."""

    def __init__(
        self, upstream: nn.Module, featurizer: nn.Module, expert: DownstreamExpert, name: str
    ):
        super().__init__()
        self.upstream, self.featurizer, self.expert, self.name = upstream, featurizer, expert, name
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> AsrTeacher:
        """Stay in eval mode, also when a parent module is set to training."""
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
    """Mean of the teachers' posteriors, equally weighted.

    The weighting is *ours*: the paper's abstract only says ensemble. Raises TeacherError if two
    teachers have different dictionaries.
    """

    def __init__(self, teachers: Sequence[AsrTeacher]):
        super().__init__(teachers)
        self.names = [teacher.name for teacher in teachers]
        self.symbols = list(teachers[0].expert.dictionary.symbols)  # the symbol of each class
        for teacher in teachers[1:]:
            self.check_symbols(teacher.expert.dictionary.symbols, teacher.name)

    def check_symbols(self, symbols: Sequence[str], name: str) -> None:
        """Raise TeacherError unless ``symbols`` is the teachers' dictionary."""
        if list(symbols) != self.symbols:
            raise TeacherError(
                f"{name} ({len(symbols)} symbols) and the teacher {self.names[0]} "
                f"({len(self.symbols)} symbols) have different dictionaries; use the same "
                "dict_path for all"
            )

    @torch.no_grad()
    def forward(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Waveforms ``[sample]`` at 16 kHz -> mean posteriors ``[batch, frame, class]`` and
        :func:`common_frames`."""
        with torch.autocast(waves[0].device.type, enabled=False):  # targets in float32
            posteriors, lengths = zip(*(teacher(waves) for teacher in self), strict=True)
        frames = min(p.shape[1] for p in posteriors)
        mean = torch.stack([p[:, :frames] for p in posteriors]).mean(0)
        return mean, common_frames(list(zip(self.names, lengths, strict=True)))


def common_frames(lengths: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Names and frame counts ``[batch]`` of models -> the smallest counts ``[batch]``.

    Upstreams round the number of frames up or down, so a difference of one is cropped. Raises
    TeacherError if counts of an utterance differ by more.
    """
    stacked = torch.stack([n.cpu().long() for _, n in lengths])  # [model, batch]
    low, high = stacked.min(0).values, stacked.max(0).values
    if (high - low).max() > 1:
        worst = int((high - low).argmax())
        counts = ", ".join(f"{name}: {int(n[worst])}" for name, n in lengths)
        raise TeacherError(
            f"the models have different frame rates (frames of one utterance: {counts}); use "
            "upstreams with the same rate and the same modelrc.*.total_rate"
        )
    return low


def load_asr_teacher(path: str) -> AsrTeacher:
    """Rebuild a finished run from its checkpoint with s3prl's classes, on the CPU.

    Call ``compat.apply()`` and ``registration.register()`` first. As in s3prl, paths in the run's
    arguments and config (upstream checkpoint, dictionary) are relative to the working folder.

    Raises:
        CheckpointError: not a checkpoint of ``-d asr``, or a file it needs is missing.
    """
    states = read_checkpoint(path)
    args, config = copy.copy(states["Args"]), copy.deepcopy(states["Config"])
    parts = {"Featurizer", "Downstream"}
    if getattr(args, "downstream", None) != "asr" or not parts <= states.keys():
        raise CheckpointError(f"{path} is not a checkpoint of run_downstream.py -d asr")
    _check_run(args, config, path)
    check_upstream_unchanged(states, path)
    # For inference only: load this checkpoint, on the CPU, without a language-model decoder.
    args.init_ckpt, args.device = path, "cpu"
    config["downstream_expert"]["datarc"]["decoder_args"] = {"decoder_type": "None"}
    from s3prl.downstream.runner import Runner

    try:
        runner = Runner(args, config)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"cannot build the model of {path}: {first_line(error)}") from None
    models = (runner.upstream.model, runner.featurizer.model, runner.downstream.model)
    return AsrTeacher(*models, name=path)


def checkpoint_in(path: Path) -> Path:
    """The checkpoint to load from a run's folder; the path of a file is returned unchanged."""
    if not path.is_dir():
        return path
    best = path / "dev-clean-best.ckpt"  # s3prl writes it once WER is below 100
    checkpoint = best if best.is_file() else newest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint (states-*.ckpt) in {path}")
    return checkpoint


def _check_run(args: Namespace, config: dict, path: str) -> None:
    """Check arguments that would make s3prl fail with a traceback or evaluate a string."""
    from s3prl import hub

    if getattr(args, "from_hf_hub", False):
        raise CheckpointError(
            f"{path}: upstreams from the Hugging Face Hub (--hub) are not allowed: they run code"
        )
    name = str(getattr(args, "upstream", None))
    if name.startswith("_") or not callable(getattr(hub, name, None)):
        raise CheckpointError(f"{path}: no such upstream in s3prl.hub: {name}")
    source = getattr(args, "upstream_ckpt", None)
    check_upstream_paths(name, source, getattr(args, "upstream_model_config", None))
    try:
        expert = config["downstream_expert"]
        select, dictionary = expert["modelrc"]["select"], expert["datarc"].get("dict_path")
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} has no config of -d asr") from None
    if select not in MODELS:  # s3prl evaluates this string
        raise CheckpointError(
            f"{path}: modelrc.select must be one of {', '.join(MODELS)}, got {select!r}"
        )
    files = {f"the checkpoint of its upstream {name}": source, "its dictionary": dictionary}
    for noun, file in files.items():
        found = not file or "://" in str(file) or Path(str(file)).exists()
        if not found and (noun == "its dictionary" or parse_hub_id(str(file)) is None):
            raise CheckpointError(
                f"{path}: {noun}, {file}, does not exist; start from the folder where the run was "
                "trained"
            )


@dataclass(frozen=True)
class EssenceSettings:
    """Teachers, selection of their posteriors, and weight of the CTC loss.

    The loss is ``alpha`` · CTC + (1 − ``alpha``) · cross-entropy against the selected posteriors
    (*paper*: a multitask loss of selected soft outputs and hard labels; *ours*: the weight 0.5 and
    CTC as the label loss). CTC is a mean over labels, the cross-entropy a mean over frames.
    """

    teachers: tuple[str, ...]
    selection: PosteriorSelection = field(default_factory=PosteriorSelection)
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be 0 (teachers only) to 1 (labels), got {self.alpha}")


class MultitaskLoss:
    """Adds the teachers' loss to a Runner's training; with ``alpha`` 1 the loss stays CTC.

    ``runner`` is s3prl's downstream Runner with an asr expert, and the ensemble is on its device.
    The loss of ``train_split`` is replaced; other splits are for evaluation.
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
            return  # CTC only: no teacher is run
        runner.featurizer.model.register_forward_pre_hook(self._store_waves)
        expert.model.register_forward_hook(self._store_logits)
        expert.register_forward_hook(self._replace_loss, with_kwargs=True)
        expert.log_records = self._log

    def _store_waves(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.waves = args[0]

    def _store_logits(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> None:
        self.logits, self.lengths = output

    def _replace_loss(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ctc: Tensor
    ) -> Tensor | None:
        logits, lengths, waves = self.logits, self.lengths, self.waves
        self.logits, self.waves = None, ()  # don't keep the graph alive during the evaluation
        if args[0] != self.train_split:
            return None
        assert logits is not None and lengths is not None  # set by _store_logits
        soft, scalars = self.soft_loss(waves, logits, lengths)
        alpha = self.settings.alpha
        # 0 times CTC would be NaN if the CTC loss is infinite (zero_infinity off).
        total = soft if alpha == 0 else alpha * ctc + (1 - alpha) * soft
        for name, value in {**scalars, "soft_loss": soft, "total_loss": total}.items():
            kwargs["records"][f"essence/{name}"].append(value.detach())
        return total

    def soft_loss(
        self, waves: Sequence[Tensor], logits: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss against the teachers for a batch, and statistics of the selection.

        Args:
            waves: waveforms ``[sample]`` at 16 kHz.
            logits: the student's, ``[batch, frame, class]``, with ``lengths`` valid frames.
        """
        posteriors, teacher_lengths = self.ensemble(waves)
        frames = min(posteriors.shape[1], logits.shape[1])
        valid = common_frames([("teachers", teacher_lengths), ("student", lengths)])
        mask = (torch.arange(frames) < valid[:, None]).to(logits.device)  # [batch, frame]
        selected = select_posteriors(posteriors[:, :frames], self.settings.selection)
        keep = selected.keep & mask
        log_probs = logits[:, :frames].float().log_softmax(-1)
        loss = soft_label_loss(log_probs, selected.posteriors, keep)
        count = keep.sum().clamp(min=1)
        classes = (selected.posteriors > 0).sum(-1)
        return loss, {
            "frames_kept": keep.sum() / mask.sum().clamp(min=1),
            "mass_kept": (selected.mass * keep).sum() / count,
            "classes_kept": (classes * keep).sum() / count,
        }

    def _log(self, split: str, records: dict[str, Any], logger: Any, **rest: Any) -> Any:
        """Write our scalars to TensorBoard as ``asr/SPLIT-NAME``, then call s3prl's method."""
        for key in [key for key in records if key.startswith("essence/")]:
            mean = torch.stack(records.pop(key)).float().mean().item()
            tag = f"asr/{split}-{key.removeprefix('essence/')}"
            logger.add_scalar(tag, mean, global_step=rest["global_step"])
        return self.log_records(split, records=records, logger=logger, **rest)


def settings_record(settings: EssenceSettings) -> dict[str, Any]:
    """The settings in a checkpoint's Config, with the SHA-256 of each teacher."""
    digests = [file_sha256(path) for path in settings.teachers]
    return {**to_plain_data(settings), "sha256": digests}


def _by_teacher(record: dict[str, Any]) -> dict[str, Any]:
    """A record in which each teacher is compared by itself."""
    paths = record.get("teachers")
    paths = paths if isinstance(paths, list) else []
    return {**record, "teachers": [{"path": path} for path in paths]}


def check_same_settings(path: str, settings: EssenceSettings) -> None:
    """Check that the settings are those of the checkpoint from which a run is resumed.

    Raises:
        CheckpointError: they differ, teachers have changed, or it is a run without teachers.
    """
    saved = read_checkpoint(path)["Config"].get(ESSENCE)
    if not isinstance(saved, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of essence asr; resume it with run_downstream.py, or name "
            "another run with -n"
        )
    current = settings_record(settings)
    if saved.get("sha256") == current["sha256"]:  # maybe at other paths
        current["teachers"] = saved.get("teachers")
    elif "sha256" not in saved:  # of an earlier version
        del current["sha256"]
    changes = config_differences(_by_teacher(saved), _by_teacher(current))
    if changes.keys() == {"sha256"}:
        raise CheckpointError(
            f"teachers have changed since {path} was written; restore them, or start a new run "
            "under another -n"
        )
    changes.pop("sha256", None)
    if changes:
        raise CheckpointError(
            f"the run of {path} has other settings: {describe_changes(changes)}; resume it with "
            "the command that started it and -a, or start a new run under another -n"
        )


def turn_off_time_warp(config: dict[str, Any], settings: EssenceSettings) -> None:
    """Set ``specaug.apply_time_warp`` to False if the run has teachers: they hear the audio without
    it, so the student's frames would be shifted against theirs. Without ``specaug`` there is none.
    """
    specaug = config.get("specaug")
    if settings.alpha < 1 and specaug and specaug.get("apply_time_warp", True):
        if not any(specaug.get(f"apply_{kind}_mask", True) for kind in ("time", "freq")):
            raise ConfigError(
                "specaug has only a time warp, which would shift the student's frames against the "
                "teachers'; remove specaug from the recipe"
            )
        specaug["apply_time_warp"] = False
        logger.info(
            "essence: specaug.apply_time_warp is off, as it would shift the student's frames "
            "against the teachers'"
        )


def distil_asr(
    script: Any, request: DownstreamRequest, ensemble: AsrEnsemble, settings: EssenceSettings
) -> None:
    """Call s3prl's ``run_downstream`` for a training run, with the teachers in its loss.

    Args:
        script: the module ``run_downstream``.
        request: checked.
        ensemble: built before the script sets its seeds, so that a run with ``alpha`` 1
            draws the same random numbers as a run of s3prl alone.
        settings: those of :func:`check_same_settings`; saved under ``essence`` in the checkpoint's
            ``Config``.
    """

    def with_teachers(make_runner: Any) -> Any:
        def make_runner_with_teachers(args: Namespace, config: dict[str, Any]) -> Any:
            turn_off_time_warp(config, settings)
            config[ESSENCE] = settings_record(settings)
            runner = make_runner(args, config)
            train_split = config["runner"].get("train_dataloader", "train")
            MultitaskLoss(runner, ensemble.to(args.device), settings, train_split)
            return runner

        return make_runner_with_teachers

    run(script, request, with_teachers)
