"""From the word in a config (``hubert_base``, ``/my/hubert.pt``) to a loaded upstream.

Hub names are looked up in s3prl's ``upstream.<family>.hubconf`` modules and not in ``s3prl.hub``,
which imports all of its 35 families first (seconds, and more packages).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from . import compat
from .distill.conv_spec import parse_conv_layers
from .distill.settings import TeacherSettings
from .distill.teachers import Teacher, TeacherEnsemble
from .errors import CheckpointError, ConfigError, TeacherError
from .safe_load import safe_load

logger = logging.getLogger(__name__)

FAMILIES = ("hubert", "wavlm", "wav2vec2", "data2vec", "unispeech_sat", "distiller")
_NOT_NAMES = ("_local", "_url", "_custom", "_gdriveid")  # entries that want a path of their own


@functools.cache
def hub_entries() -> Mapping[str, Callable[..., nn.Module]]:
    """Hub name -> s3prl's loader, for every entry of :data:`FAMILIES` that needs no path."""
    compat.apply()
    entries = {}
    for family in FAMILIES:
        module = importlib.import_module(f"s3prl.upstream.{family}.hubconf")
        for name, value in vars(module).items():
            own = callable(value) and getattr(value, "__module__", None) == module.__name__
            if own and not name.startswith("_") and not name.endswith(_NOT_NAMES):
                entries[name] = value
    return entries


def check_source(model: str, where: str) -> None:
    """Refuse early, before anything is downloaded or built, what cannot be a teacher.

    Raises:
        TeacherError: neither a known hub name nor an existing file.
    """
    if model in hub_entries() or Path(model).is_file():
        return
    if Path(model).is_dir():
        raise TeacherError(f"{where}: {model} is a folder; name a checkpoint file in it")
    if "/" in model or "\\" in model or Path(model).suffix:
        raise TeacherError(f"{where}: there is no checkpoint {model}")
    close = difflib.get_close_matches(model, hub_entries(), n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise TeacherError(
        f"{where}: unknown teacher {model!r}{guess}; give the path of a checkpoint or one of: "
        f"{', '.join(sorted(hub_entries()))}"
    )


def load_upstream(model: str, where: str) -> nn.Module:
    """Load one upstream by hub name or from a checkpoint of s3prl's HuBERT or WavLM format.

    Raises:
        TeacherError: unknown name, or its download failed.
        CheckpointError: the file is damaged, of another kind, or asks for code.
    """
    check_source(model, where)
    if model in hub_entries() and not Path(model).is_file():
        return _from_hub(model, where)
    return _from_file(Path(model), where)


def _from_hub(name: str, where: str) -> nn.Module:
    import requests  # s3prl downloads with it, so it is there

    try:
        return hub_entries()[name]()
    except (requests.RequestException, OSError) as error:
        raise TeacherError(
            f"{where}: the download of {name} failed ({type(error).__name__}); fetch it on a "
            "machine with network access and give the path of the file instead"
        ) from None


def _from_file(path: Path, where: str) -> nn.Module:
    states = safe_load(path, "teacher checkpoint")
    family, config = identify(states, path)
    text = config.get("conv_feature_layers")
    if text is not None:
        # s3prl evaluates this string of the file: only a list of number triples may pass.
        parse_conv_layers(str(text), f"{where}: conv_feature_layers in {path}")
    del states
    logger.info("%s: %s is a %s checkpoint", where, path, family)
    hubconf = importlib.import_module(f"s3prl.upstream.{family}.hubconf")
    try:
        return getattr(hubconf, f"{family}_local")(str(path))
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{where}: {path} does not load as a {family} checkpoint: {first}"
        ) from None


def identify(states: Mapping, path: Path) -> tuple[str, Mapping]:
    """The family of a checkpoint, from its keys, and its model configuration.

    Raises:
        CheckpointError: a kind that is not known here.
    """
    if {"task_cfg", "model_cfg", "model_weight", "dictionaries_symbols"} <= states.keys():
        return "hubert", states["model_cfg"]
    if {"cfg", "model"} <= states.keys() and isinstance(states["cfg"], dict):
        if "conv_feature_layers" in states["cfg"]:
            return "wavlm", states["cfg"]
        raise CheckpointError(
            f"{path} is a fairseq checkpoint; convert it where fairseq is installed: "
            "python -m s3prl.upstream.hubert.convert CKPT --output_dir DIR"
        )
    raise CheckpointError(
        f"{path} is no checkpoint of s3prl's HuBERT or WavLM format; its keys are: "
        f"{', '.join(map(str, list(states)[:8]))}"
    )


def load_teachers(settings: Mapping[str, TeacherSettings], dropout: bool) -> TeacherEnsemble:
    """Load all teachers of a configuration, frozen.

    Raises:
        TeacherError, CheckpointError: see :func:`load_upstream` and :class:`Teacher`.
    """
    for name, teacher in settings.items():
        check_source(teacher.model, f"teachers.{name}.model")
    teachers = {}
    for name, teacher in settings.items():
        upstream = load_upstream(teacher.model, f"teachers.{name}.model")
        teachers[name] = Teacher(upstream, teacher.layers, name)
    return TeacherEnsemble(teachers, dropout)


def teacher_model(ensemble: TeacherEnsemble, name: str) -> nn.Module:
    """The fairseq-style model inside a teacher, from which a student can start.

    Raises:
        ConfigError: this teacher has none.
    """
    model = getattr(ensemble[name].upstream, "model", None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"init.teacher: {name} has no weights of the student's layout")
    return model
