"""Names of teachers and checks of their sources; does not import torch or s3prl."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..compat.source import upstream_names
from ..distill.settings import TeacherSettings
from ..errors import TeacherError
from ..files.hub import parse_hub_id, pin
from . import zoo

FAMILIES = ("hubert", "wavlm", "wav2vec2", "data2vec", "unispeech_sat", "distiller")
STORED = "stored_states.json"  # in a folder of :mod:`.stored`
_NEEDS_PATH = ("_local", "_url", "_custom", "_gdriveid")  # entries that need a path


@functools.cache
def names_by_family() -> Mapping[str, tuple[str, ...]]:
    """Family -> its hub names, for every entry that doesn't need a path."""
    return {
        family: tuple(sorted(n for n in upstream_names(family) if not n.endswith(_NEEDS_PATH)))
        for family in FAMILIES
    }


def hub_names() -> set[str]:
    """The hub names of all :data:`FAMILIES`."""
    return {name for names in names_by_family().values() for name in names}


def check_teacher_sources(teachers: Mapping[str, TeacherSettings], prefix: str = "") -> None:
    """:func:`check_source` for each teacher of a config; ``prefix``: before the YAML path."""
    for name, teacher in teachers.items():
        check_source(teacher.model, f"{prefix}teachers.{name}.model")


def check_source(model: str, location: str) -> None:
    """Reject a source that cannot be a teacher, before anything is downloaded or built.

    Raises:
        TeacherError: not a name (s3prl's hub, :mod:`.zoo`), an existing file, a folder of stored
            hidden states, a Hugging Face folder with a supported model, or an id of the Hugging
            Face Hub.
    """
    path = Path(model)
    if model in zoo.NAMES or model in hub_names() or path.is_file() or (path / STORED).is_file():
        return
    if path.is_dir():
        from .huggingface import check_hf_folder

        check_hf_folder(path, location)
        return
    if parse_hub_id(model) is not None:
        return
    if "/" in model or "\\" in model or path.suffix:
        raise TeacherError(
            f"{location}: no such checkpoint: {model}; give a path, or an id of the Hugging Face "
            "Hub, ORG/NAME or ORG/NAME@REVISION"
        )
    names = sorted([*hub_names(), *zoo.NAMES])
    close = difflib.get_close_matches(model, names, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise TeacherError(
        f"{location}: no such teacher {model!r}{guess}; give the path of a checkpoint, an id of "
        f"the Hugging Face Hub (ORG/NAME) or one of: {', '.join(names)}"
    )


def pin_teachers(teachers: Mapping[str, TeacherSettings]) -> dict[str, TeacherSettings]:
    """The teachers of a config with the commit in each id of the Hugging Face Hub, so that a run's
    record says which files it used.

    Raises:
        TeacherError: an id cannot be looked up; see :func:`..files.hub.fetch`.
    """
    pinned = dict(teachers)
    for name, teacher in teachers.items():
        if (source := parse_hub_id(teacher.model)) is not None:
            model = str(pin(source, f"teachers.{name}.model", TeacherError))
            pinned[name] = replace(teacher, model=model)
    return pinned
