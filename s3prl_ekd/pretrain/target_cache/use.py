"""Use a target cache in a run: check that settings, teachers and data allow it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ...data.settings import DataSettings
from ...data.tables import Utterance
from ...distill.teachers import TeacherEnsemble
from ...distill.unit_loss import UnitLabels
from ...errors import ConfigError, DataError
from ...files.text import CONTROL
from ...hidden_states.fingerprint import cache_key, check_aggregated, matching_subset
from ...hidden_states.store import BUILD, VERSION, TargetReader
from ..config_diff import table_digests
from ..settings import ModelFile

logger = logging.getLogger(__name__)

INSTEAD = "or train without pretrain_expert.datarc.target_cache"


def check_teacher_settings(settings: ModelFile) -> None:
    """Reject settings that make teacher outputs non-deterministic. Raises ConfigError."""
    if settings.teacher_dropout:
        raise ConfigError(
            "teacher_dropout: true gives different targets at each step, which cannot be cached; "
            f"use false, {INSTEAD}"
        )


def check_unit_layers(units: Sequence[UnitLabels], settings: ModelFile) -> None:
    """Reject units of a layer that is not among the cached targets. Raises ConfigError."""
    for i, labels in enumerate(units):
        teacher = settings.teachers.get(labels.teacher)
        if teacher is not None and (labels.layer,) not in teacher.targets:
            raise ConfigError(
                f"unit_loss[{i}].file has units of layer {labels.layer} of {labels.teacher}, which "
                "is not among its targets, and a target cache has only these; fit units of a "
                f"target layer, {INSTEAD}"
            )


def open_targets(folder: str | Path, settings: ModelFile) -> TargetReader:
    """Open the target cache of a run; :func:`check_cache` compares it with the teachers.

    Raises:
        DataError: it is incomplete or damaged.
        ConfigError: with these settings, targets differ between epochs or include padding.
    """
    if settings.distortion.setup in ("setup2", "same"):
        raise ConfigError(
            f"distortion.setup {settings.distortion.setup} gives the teachers distorted audio, "
            "differently in each epoch, but cached targets are of clean audio; use setup1, "
            f"{INSTEAD}"
        )
    check_teacher_settings(settings)
    if not settings.loss.mask_padding:
        raise ConfigError(
            "loss.mask_padding: false includes the teachers' outputs for padding in the loss, but "
            f"cached targets have no padding; use true, {INSTEAD}"
        )
    reader = TargetReader(folder)
    if reader.index.version < VERSION:
        logger.warning(
            "%s: an earlier version of s3prl_ekd built this target cache, which does not show "
            "whether the audio has changed since",
            folder,
        )
    if reader.aggregated:
        check_aggregated(settings)
    return reader


def check_cache(
    reader: TargetReader,
    teachers: TeacherEnsemble,
    settings: ModelFile,
    data: DataSettings,
    rows: Sequence[Utterance],
) -> None:
    """Reject a cache of other teachers or data; select the subset of it that the run needs.

    Raises:
        DataError: naming the difference, and the command that builds a cache.
    """
    tables = table_digests(data.file_path, [*data.sets, *data.dev_sets])
    key = cache_key(teachers, settings, data, tables, aggregated=reader.aggregated)
    try:
        reader.subset = matching_subset(reader.index, key, rows)
        for name, _, dim in reader.subset.layout:
            if name in teachers and teachers[name].width != dim:
                raise DataError(f"teachers.{name}: another width than when the cache was built")
    except DataError as error:
        raise DataError(
            f"the target cache {reader.folder} does not fit this run: "
            f"{CONTROL.sub('?', str(error))[:500]}; build another with: {BUILD} NEW_FOLDER"
        ) from None


def free_teachers(teachers: TeacherEnsemble) -> None:
    """Free the teachers' weights; keep their shapes."""
    for teacher in teachers.values():
        teacher.upstream, teacher.encoder = nn.Identity(), None
    gc.collect()
