"""Load the teachers of a config: hub names of s3prl, checkpoints, folders (Hugging Face, stored),
models of the Hugging Face Hub.

Hub names are looked up in s3prl's ``upstream.<family>.hubconf`` modules. ``s3prl.hub`` would import
all of its families first, which takes time and needs more packages.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from .. import compat
from ..distill.settings import DistillSettings, TeacherSettings
from ..distill.teachers import Teacher, TeacherEnsemble
from ..errors import ConfigError, TeacherError
from ..files.atomic import atomic_torch_save
from ..files.hub import fetch, parse_hub_id
from ..files.torch_load import restrict_torch
from ..system.precision import choose_precision
from . import zoo
from .checkpoint import load_file
from .fast import encoder as fast
from .names import STORED, check_source, check_teacher_sources, hub_names, names_by_family

if TYPE_CHECKING:
    from s3prl.upstream.interfaces import UpstreamBase

    from ..distill.student import Student
    from ..distill.student_settings import CopySettings, PruningSettings
    from .huggingface import HuggingFaceUpstream


def hub_entry(name: str) -> Callable[[], UpstreamBase]:
    """s3prl's function that loads the upstream of a hub name of :data:`.names.FAMILIES`."""
    compat.apply()
    family = next(family for family, names in names_by_family().items() if name in names)
    return getattr(importlib.import_module(f"s3prl.upstream.{family}.hubconf"), name)


def load_hub_name(name: str, location: str) -> nn.Module:
    """Load one upstream, downloaded or from s3prl's download cache.

    Raises:
        TeacherError: the download failed.
    """
    import requests  # a dependency of s3prl, which downloads with it

    restrict_torch()
    compat.apply()  # again, because torch.load may reject more classes after restrict_torch()
    try:
        upstream = hub_entry(name)()
    except (requests.RequestException, OSError) as error:
        raise TeacherError(
            f"{location}: cannot download {name} ({type(error).__name__}); download it on another "
            "machine and give the path of the file"
        ) from None
    if name in names_by_family()["distiller"]:
        from .distilhubert import DistilHubertUpstream

        # s3prl's expert appends the heads' predictions to the hidden states.
        return DistilHubertUpstream(upstream.model.model)
    return upstream


def load_upstream(model: str, location: str) -> nn.Module:
    """Load one upstream by name, from a checkpoint file, or from a folder: of a Hugging Face model,
    or of stored hidden states.

    Args:
        model: a hub name, a tiny teacher's name, a path, or an id of the Hugging Face Hub. A file
            of that name takes precedence, over an id a folder, too.
        location: starts messages.

    Raises:
        TeacherError: unknown name, failed download, or an unsupported kind.
        CheckpointError: the file is damaged, of another kind, or its pickle contains code.
    """
    compat.apply()  # for Python callers: s3prl's upstreams import torchaudio
    check_source(model, location)
    path = Path(model)
    if path.is_file():
        return load_file(path, location)
    if model in zoo.NAMES:
        return load_tiny(model, location)
    if model in hub_names():
        return load_hub_name(model, location)
    if (path / STORED).is_file():
        from .stored import StoredStates

        return StoredStates(path, location)
    from .huggingface import load_folder

    if (hub_model := parse_hub_id(model)) is not None:
        path = fetch(hub_model, location, TeacherError).folder
    return load_folder(path, location)


def load_tiny(name: str, location: str) -> nn.Module:
    """Load one of :data:`.zoo.NAMES`, trained or randomly initialised, as s3prl's expert.

    Raises:
        SetupError: the file is missing from the installation.
        CheckpointError: the file is damaged.
    """
    compat.apply()
    if name not in zoo.RANDOM_INIT:
        return load_file(zoo.checkpoint_path(name), location)
    from .random_weights import random_init

    # s3prl's experts need a path
    with tempfile.TemporaryDirectory(prefix="ekd_random_init_") as folder:
        path = Path(folder, f"{name}.pt")
        atomic_torch_save(random_init(name), path)
        return load_file(path, location)


def choose_teacher_precision(settings: DistillSettings, device: str) -> tuple[Any, str]:
    """The precision in which fast teachers compute on a device, and the reason.

    Resolves ``teacher_precision: auto``; see :func:`.choose_precision`.
    """
    if settings.teacher_dropout or settings.teacher_backend == "s3prl":
        return "float32", "s3prl's upstreams"
    return choose_precision(settings.teacher_precision, device, "teacher_precision")


def load_teachers(
    settings: Mapping[str, TeacherSettings],
    dropout: bool,
    backend: str = "fast",
    precision: str = "float32",
    compiled: bool = False,
    masked_norm: bool = False,
) -> TeacherEnsemble:
    """Load all teachers of a config, frozen.

    Args:
        settings: by teacher name.
        dropout, backend, precision, compiled, masked_norm: ``teacher_dropout``,
            ``teacher_backend``, ``teacher_precision``, ``teacher_compile`` and
            ``teacher_masked_norm`` of :class:`~s3prl_ekd.distill.settings.DistillSettings`;
            ``auto`` must be resolved, by ``choose_teacher_precision``.

    Raises:
        ConfigError: ``masked_norm`` with a teacher that has no fast encoder.
        TeacherError, CheckpointError: see :func:`load_upstream` and :class:`Teacher`.
    """
    check_teacher_sources(settings)
    teachers = {}
    for name, teacher in settings.items():
        upstream = load_upstream(teacher.model, f"teachers.{name}.model")
        teachers[name] = Teacher(upstream, teacher.targets, name)
    if backend == "fast" and not dropout:
        upstreams = {name: teacher.upstream for name, teacher in teachers.items()}
        encoders = fast.fast_encoders(upstreams, precision, compiled, masked_norm)
        for name, encoder in encoders.items():
            teachers[name].encoder = encoder
        for name in upstreams if masked_norm else ():
            if name not in encoders:
                raise ConfigError(
                    f"teacher_masked_norm: the fast backend does not support teachers.{name}.model "
                    f"({settings[name].model}); set it to false (the targets of a target cache do "
                    "not depend on padding either)"
                )
    return TeacherEnsemble(teachers, dropout)


def teacher_model(ensemble: TeacherEnsemble, name: str, setting: str = "init.teacher") -> nn.Module:
    """A teacher's model to initialise or to make a student from, in fairseq's layout (see
    :func:`~s3prl_ekd.distill.initialisation.initialise`).

    Raises:
        ConfigError: the teacher has no such model; the message names ``setting``.
    """
    upstream = ensemble[name].upstream
    if hasattr(upstream, "fairseq_layout"):  # a Hugging Face teacher
        return cast("HuggingFaceUpstream", upstream).fairseq_layout(f"{setting}: {name}")
    student = getattr(upstream, "student", None)  # the backbone of an EKD student has this layout
    model = getattr(upstream, "model", None) if student is None else student.backbone
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{setting}: {name} has no weights in the student's layout; choose another teacher"
            + (" or set init.teacher: null" if setting == "init.teacher" else "")
        )
    return model


def copied_student(
    ensemble: TeacherEnsemble, copy: CopySettings, pruning: PruningSettings | None
) -> Student:
    """A student that is a copy of a teacher.

    Raises:
        ConfigError, TeacherError: the teacher is not a HuBERT, wav2vec 2.0 or WavLM.
    """
    from ..distill.pruning.copy import copy_teacher

    model = teacher_model(ensemble, copy.of, "student.of")
    upstream = ensemble[copy.of].upstream
    student = getattr(upstream, "student", None)  # of a student as a teacher
    normalize = getattr(upstream, "normalize", None)  # of a Hugging Face teacher
    if student is not None:
        normalize = student.settings.normalize_waveforms
    elif normalize is None:
        try:
            normalize = fast.normalizes(cast("UpstreamBase", upstream))
        except AttributeError:
            raise TeacherError(
                f"student.of: {copy.of}: it is not known whether this teacher "
                f"({type(upstream).__module__}) normalises waveforms; copy a HuBERT, wav2vec 2.0 "
                "or WavLM"
            ) from None
    return copy_teacher(model, normalize, copy, pruning)
