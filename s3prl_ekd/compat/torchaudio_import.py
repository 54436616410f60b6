"""Importing torchaudio where its compiled part does not load, and its lost no-op."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from ..errors import SetupError
from .shim import Shim

# What the dynamic loader (OSError) and torchaudio's own check of the CUDA version
# (RuntimeError) raise. A torchaudio that is not installed at all is another matter.
LOAD_FAILURES = (OSError, RuntimeError)


def lacks(attribute: str) -> bool:
    """Whether torchaudio has no such attribute; one that does not import has none."""
    try:
        return not hasattr(importlib.import_module("torchaudio"), attribute)
    except LOAD_FAILURES:
        return True


def _does_not_import() -> bool:
    try:
        importlib.import_module("torchaudio")
    except LOAD_FAILURES:
        return True
    return False


def _import_without_extension() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        del sys.modules[name]
    stand_in = _extension_stand_in()
    sys.modules[stand_in.__name__] = stand_in
    try:
        importlib.import_module("torchaudio")
    except LOAD_FAILURES as error:
        del sys.modules[stand_in.__name__]
        raise SetupError(
            f"torchaudio does not import, not even without its compiled part: {error}; "
            "install the torchaudio that belongs to your torch"
        ) from error


def _extension_stand_in() -> ModuleType:
    """A ``torchaudio._extension`` that says: there is no compiled part.

    torchaudio asks these names for what was built and then takes its pure Python branch. The
    RIR and SoX names are those of torchaudio 2.5 to 2.8.
    """
    module = ModuleType("torchaudio._extension")
    vars(module).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _IS_RIR_AVAILABLE=False,
        fail_if_no_align=_unavailable,
        fail_if_no_rir=_unavailable,
        lazy_import_sox_ext=_NoSox,
        _check_cuda_version=lambda: None,
        _load_lib=lambda name: False,
    )
    return module


def _unavailable(function: Callable[..., Any]) -> Callable[..., NoReturn]:
    @functools.wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"torchaudio's {function.__name__} needs its compiled part, which does not load "
            "beside this torch; install the torchaudio that belongs to your torch"
        )

    return refuse


class _NoSox:
    """SoX bindings that are not there: asked politely they say so, used they raise."""

    def is_available(self) -> bool:
        return False

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"torchaudio's SoX bindings do not load here (asked for {name})")


IMPORT = Shim(
    name="torchaudio",
    needed_by=("run_downstream.py:8", "downstream/runner.py:13", "downstream/asr/dataset.py:25"),
    since="torchaudio 2.9",
    summary="its compiled part does not load beside this torch, imported without it",
    missing=_does_not_import,
    apply=_import_without_extension,
)


def set_audio_backend(backend: str | None = None) -> None:
    """Nothing: there is one way to read audio, and no backend to choose."""


def _add_set_audio_backend() -> None:
    vars(importlib.import_module("torchaudio"))["set_audio_backend"] = set_audio_backend


SET_AUDIO_BACKEND = Shim(
    name="torchaudio.set_audio_backend",
    needed_by=("run_downstream.py:157", "upstream/byol_s/byol_a/common.py:20"),
    since="torchaudio 2.9",
    summary="a function that does nothing",
    missing=functools.partial(lacks, "set_audio_backend"),
    apply=_add_set_audio_backend,
)
