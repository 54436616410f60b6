"""The prediction heads of a student file, with which a run of ``student.keep_heads`` begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from ..distill.aggregation import describe_targets
from ..distill.distiller import EnsembleDistiller
from ..distill.settings import TeacherSettings
from ..distill.student_settings import FileSettings
from ..errors import ConfigError
from ..files.hub import may_be_same
from ..student_file import LoadedStudent
from .settings import load_model_config

logger = logging.getLogger(__name__)


def load_heads(
    distiller: EnsembleDistiller, loaded: LoadedStudent, teacher_digests: Mapping[str, str]
) -> None:
    """Continue with the prediction heads of ``student.file``.

    Args:
        distiller: new; its heads are overwritten.
        loaded: the contents of the file, with heads.
        teacher_digests: of the teachers' weights, by name.

    Raises:
        ConfigError: they predict other targets, or those of other teachers.
    """
    settings = distiller.settings
    file = cast(FileSettings, settings.student).file
    instead = "or set student.keep_heads: false to start with new heads"
    heads, specs = distiller.heads, distiller.aggregate.specs
    assert loaded.heads is not None
    same_kind = loaded.heads.kind == heads.kind
    if heads.kind == "layerwise":  # other kinds have no further settings in the file
        same_kind = same_kind and loaded.heads.settings == heads.settings
    if loaded.targets != specs or not same_kind:
        raise ConfigError(
            f"student.file: the heads of {file} predict {describe_targets(loaded.targets)} "
            f"({loaded.heads.kind}), this experiment {describe_targets(specs)} ({heads.kind}); "
            f"use the teachers, aggregation and heads of its first run, {instead}"
        )
    for name, spec in specs.items():  # only files of layerwise heads tell which layers
        members = loaded.targets[name].members
        if heads.kind == "layerwise" and members != spec.members:
            raise ConfigError(
                f"student.file: the heads of {file} predict the layers "
                f"{[list(target) for target in members]} for {name}, this experiment "
                f"{[list(target) for target in spec.members]}; use the layers of its first "
                f"run, {instead}"
            )
    first = _teachers_of_file(loaded.about)
    digests = loaded.about.get("teachers")
    names = digests if isinstance(digests, dict) else first
    if names and names.keys() != settings.teachers.keys():
        raise ConfigError(
            f"student.file: {file} was distilled from the teachers {', '.join(names)}, this "
            f"experiment has {', '.join(settings.teachers)}; use the same, {instead}"
        )
    for name, old in first.items():
        new = settings.teachers.get(name, old)
        if old.targets != new.targets:
            raise ConfigError(
                f"student.file: the heads of {file} predict the layers "
                f"{[list(target) for target in old.targets]} of {name}, this experiment "
                f"{[list(target) for target in new.targets]}; use the layers of its first run, "
                f"{instead}"
            )
        if not isinstance(digests, dict) and not may_be_same(old.model, new.model):
            logger.warning(
                "student.file: the heads of %s were trained with teachers.%s.model: %s, this "
                "experiment has %s",
                *(file, name, old.model, new.model),
            )
    for name, digest in teacher_digests.items():
        if isinstance(digests, dict) and digests[name] != digest:
            raise ConfigError(
                f"student.file: {file} was distilled from another teacher {name} (its weights "
                f"differ from those of teachers.{name}.model); use that teacher, {instead}"
            )
    heads.load_state_dict(loaded.heads.state_dict())


def _teachers_of_file(about: Mapping[str, Any]) -> Mapping[str, TeacherSettings]:
    """The teachers of the run that a student file is from; empty if it does not tell."""
    config = about.get("config")
    try:
        return load_model_config(config).teachers if isinstance(config, dict) else {}
    except ConfigError:
        return {}
