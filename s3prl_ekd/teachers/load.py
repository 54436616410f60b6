"""Load the teachers of a configuration: s3prl's hub names, checkpoints, Hugging Face folders.

Hub names are looked up in s3prl's ``upstream.<family>.hubconf`` modules and not in ``s3prl.hub``,
which imports all of its 35 families first (seconds, and more packages).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from .. import compat
from ..distill.settings import TeacherSettings
from ..distill.teachers import Teacher, TeacherEnsemble
from ..errors import ConfigError, SetupError, TeacherError
from ..files.atomic import save_whole
from ..files.torch_load import restrict_torch
from . import zoo
from .checkpoint import load_file
from .fast.encoder import fast_encoders

if TYPE_CHECKING:
    from s3prl.upstream.interfaces import UpstreamBase

    from .huggingface import HuggingFaceUpstream

FAMILIES = ("hubert", "wavlm", "wav2vec2", "data2vec", "unispeech_sat", "distiller")
_NOT_NAMES = ("_local", "_url", "_custom", "_gdriveid")  # entries that want a path of their own


@functools.cache
def names_by_family() -> Mapping[str, Mapping[str, Callable[..., UpstreamBase]]]:
    """Family -> hub name -> s3prl's loader, for every entry that needs no path."""
    compat.apply()
    families: dict[str, dict[str, Callable[..., UpstreamBase]]] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"s3prl.upstream.{family}.hubconf")
        entries = families[family] = {}
        for name, value in vars(module).items():
            own = callable(value) and getattr(value, "__module__", None) == module.__name__
            if own and not name.startswith("_") and not name.endswith(_NOT_NAMES):
                entries[name] = value
    return families


@functools.cache
def hub_entries() -> Mapping[str, Callable[..., UpstreamBase]]:
    """Hub name -> s3prl's loader, over all of :data:`FAMILIES`."""
    families = names_by_family().values()
    return {name: entry for entries in families for name, entry in entries.items()}


def load_hub_name(name: str, where: str) -> nn.Module:
    """Download (or find in s3prl's cache) and load one upstream.

    Raises:
        TeacherError: the download failed.
    """
    import requests  # s3prl downloads with it, so it is there

    restrict_torch()
    compat.apply()  # again, as torch may refuse more classes by now
    try:
        upstream = hub_entries()[name]()
    except (requests.RequestException, OSError) as error:
        raise TeacherError(
            f"{where}: the download of {name} failed ({type(error).__name__}); fetch it on a "
            "machine with network access and give the path of the file instead"
        ) from None
    if name in names_by_family()["distiller"]:
        from .distilhubert import DistilHubertUpstream

        # s3prl's expert puts the heads' predictions behind the layers; a teacher has layers only.
        return DistilHubertUpstream(upstream.model.model)
    return upstream


def check_source(model: str, where: str) -> None:
    """Refuse early, before anything is downloaded or built, what cannot be a teacher.

    Raises:
        TeacherError: neither a known name (s3prl's hub, :mod:`.zoo`) nor an existing file
            nor a Hugging Face folder of a known model.
    """
    path = Path(model)
    if model in zoo.NAMES or model in hub_entries() or path.is_file():
        return
    if path.is_dir():
        from .huggingface import check_folder

        check_folder(path, where)
        return
    if "/" in model or "\\" in model or path.suffix:
        raise TeacherError(f"{where}: there is no checkpoint {model}")
    known = sorted([*hub_entries(), *zoo.NAMES])
    close = difflib.get_close_matches(model, known, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise TeacherError(
        f"{where}: unknown teacher {model!r}{guess}; give the path of a checkpoint or one of: "
        f"{', '.join(known)}"
    )


def load_upstream(model: str, where: str) -> nn.Module:
    """Load one upstream by name, from a checkpoint file or from a Hugging Face folder.

    Args:
        model: a hub name, a tiny teacher's name or a path; a file of that path goes before a name.
        where: the YAML path for messages.

    Raises:
        TeacherError: unknown name, failed download, or a kind that cannot be read here.
        CheckpointError: the file is damaged, of another kind, or asks for code.
    """
    compat.apply()  # for callers from Python: s3prl's upstreams import torchaudio
    check_source(model, where)
    path = Path(model)
    if path.is_file():
        return load_file(path, where)
    if model in zoo.NAMES:
        return load_tiny(model, where)
    if model in hub_entries():
        return load_hub_name(model, where)
    from .huggingface import load_folder

    return load_folder(path, where)


def load_tiny(name: str, where: str) -> nn.Module:
    """Load a tiny teacher of this package, or a random twin of one, as s3prl's expert.

    Args:
        name: one of :data:`s3prl_ekd.teachers.zoo.NAMES`.
        where: what messages start with.

    Raises:
        SetupError: the installation lacks the file.
        CheckpointError: the file is damaged.
    """
    compat.apply()
    if name not in zoo.TWINS:
        return load_file(zoo.weights(name), where)
    from .random_weights import random_twin

    with tempfile.TemporaryDirectory(prefix="ekd_twin_") as folder:  # s3prl's experts want a path
        path = Path(folder, f"{name}.pt")
        save_whole(random_twin(name), path)
        return load_file(path, where)


def check_precision(precision: str, device: str) -> None:
    """Refuse bfloat16 on a CPU: some claim instructions for it that they have not, and Python dies.

    Args:
        precision: ``teacher_precision``.
        device: of the teachers.

    Raises:
        SetupError: what to set instead.
    """
    if precision == "bfloat16" and not device.startswith("cuda"):
        raise SetupError(
            f"teacher_precision: bfloat16 needs a CUDA device, and this is {device}; put float32"
        )


def load_teachers(
    settings: Mapping[str, TeacherSettings],
    dropout: bool,
    backend: str = "fast",
    precision: str = "float32",
    compiled: bool = False,
) -> TeacherEnsemble:
    """Load all teachers of a configuration, frozen.

    Args:
        settings: by name.
        dropout: leave the teachers' dropout on; they are then run as they are.
        backend, precision, compiled: ``teacher_backend``, ``teacher_precision`` and
            ``teacher_compile`` of :class:`~s3prl_ekd.distill.settings.DistillSettings`.

    Raises:
        TeacherError, CheckpointError: see :func:`load_upstream` and :class:`Teacher`.
    """
    for name, teacher in settings.items():
        check_source(teacher.model, f"teachers.{name}.model")
    teachers = {}
    for name, teacher in settings.items():
        upstream = load_upstream(teacher.model, f"teachers.{name}.model")
        teachers[name] = Teacher(upstream, teacher.targets, name)
    if backend == "fast" and not dropout:
        upstreams = {name: teacher.upstream for name, teacher in teachers.items()}
        for name, encoder in fast_encoders(upstreams, precision, compiled).items():
            teachers[name].encoder = encoder
    return TeacherEnsemble(teachers, dropout)


def teacher_model(ensemble: TeacherEnsemble, name: str) -> nn.Module:
    """The model inside a teacher in fairseq's layout, from which a student can start.

    That layout is ``feature_extractor``, ``post_extract_proj``, ``encoder.pos_conv`` and
    ``encoder.layers``. A Hugging Face model is given as a copy under these names.

    Raises:
        ConfigError: this teacher has none.
    """
    upstream = ensemble[name].upstream
    if hasattr(upstream, "fairseq_layout"):  # a Hugging Face teacher
        return cast("HuggingFaceUpstream", upstream).fairseq_layout(f"init.teacher: {name}")
    student = getattr(upstream, "student", None)  # an EKD student: its backbone is of this layout
    model = getattr(upstream, "model", None) if student is None else student.backbone
    if not isinstance(model, nn.Module):
        raise ConfigError(f"init.teacher: {name} has no weights of the student's layout")
    return model
