"""Shims to import torchaudio without its compiled extension, and for ``set_audio_backend``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ..errors import SetupError
from .shim import Shim

# Raised by the dynamic loader (OSError) and by torchaudio's check of the CUDA version
# (RuntimeError). ImportError is not among them: torchaudio is then not installed.
LOAD_FAILURES = (OSError, RuntimeError)


def lacks(attribute: str) -> bool:
    """Whether torchaudio has no such attribute, or cannot be imported."""
    try:
        return not hasattr(importlib.import_module("torchaudio"), attribute)
    except LOAD_FAILURES:
        return True


def set_attributes(**attributes: Any) -> None:
    """Set attributes of torchaudio."""
    vars(importlib.import_module("torchaudio")).update(attributes)


def _import_without_extension() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        del sys.modules[name]
    sys.modules["torchaudio._extension"] = _extension_replacement()
    try:
        importlib.import_module("torchaudio")
    except LOAD_FAILURES as error:
        del sys.modules["torchaudio._extension"]
        raise SetupError(
            f"cannot import torchaudio, even without its compiled extension: {error}; install the "
            "torchaudio release that matches your torch"
        ) from error


def repair() -> str:
    """How to make torchaudio importable in other programs, for an installation that needs the shim.

    Without library files, torchaudio uses its Python code, as with the shim.
    """
    spec = importlib.util.find_spec("torchaudio")
    folders = (spec.submodule_search_locations if spec else None) or ["torchaudio"]
    libraries = shlex.quote(str(Path(folders[0], "lib"))) + "/*torchaudio*.so"
    return (
        "install the torchaudio for this torch (pytorch.org/get-started/locally), or remove "
        f"the libraries that do not load, which torchaudio can do without: rm {libraries}"
    )


def _extension_replacement() -> ModuleType:
    """A ``torchaudio._extension`` that reports no compiled extension.

    torchaudio reads these names to choose its pure Python code. The RIR and SoX names are those of
    torchaudio 2.5 to 2.8.
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
    def unavailable(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"torchaudio's {function.__name__} needs torchaudio's compiled extension, which does "
            "not load with this torch; install the torchaudio release that matches your torch"
        )

    return unavailable


class _NoSox:
    """Missing SoX bindings: ``is_available`` is False, any other attribute raises."""

    def is_available(self) -> bool:
        return False

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"cannot use {name}: torchaudio's SoX bindings do not load")


IMPORT = Shim(
    name="torchaudio",
    needed_by=("run_downstream.py:8", "downstream/runner.py:13", "downstream/asr/dataset.py:25"),
    since="torchaudio 2.9",
    summary="imported without its compiled extension, which does not load with this torch",
    missing=lambda: lacks("__name__"),
    apply=_import_without_extension,
)


def set_audio_backend(backend: str | None = None) -> None:
    """Do nothing: there is only one audio backend."""


SET_AUDIO_BACKEND = Shim(
    name="torchaudio.set_audio_backend",
    needed_by=("run_downstream.py:157", "upstream/byol_s/byol_a/common.py:20"),
    since="torchaudio 2.9",
    summary="a function that does nothing",
    missing=lambda: lacks("set_audio_backend"),
    apply=lambda: set_attributes(set_audio_backend=set_audio_backend),
)
