"""Bypass s3prl's cache of SID's file lists.

s3prl's ``downstream/voxceleb1/dataset.py`` caches the paths of the audio files as pickles in its
own folder (``.cache/train.pkl`` ...). This has two problems:

- The file names don't depend on the corpus, so a second corpus would silently train on the files of
  the first.
- Reading a pickle can run code, so anyone who can write into that folder could run code.

No setting turns the cache off. So this module patches s3prl's module on import: each data set
gets a new, private, empty folder, which is removed at exit.

Each run then searches for the files: about 10 s for the 153,516 files of VoxCeleb1 on a local disk.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ..errors import SetupError
from .child_processes import forget_in_children, repeat_in_children
from .import_hooks import forget_import
from .patched_modules import patch_module

logger = logging.getLogger(__name__)

DATASET = "s3prl.downstream.voxceleb1.dataset"


class EmptyFolder(os.PathLike):
    """A replacement for ``path`` that creates a new empty folder at each ``os.fspath``."""

    def __init__(self, path: str | os.PathLike = "") -> None:
        self.path = path
        self._root: tempfile.TemporaryDirectory | None = None

    def __fspath__(self) -> str:
        if self._root is None:
            self._root = tempfile.TemporaryDirectory(prefix="s3prl_ekd_sid_")
        return tempfile.mkdtemp(dir=self._root.name)


def bypass_cache() -> None:
    """Bypass the cache of s3prl's SID data set, here and in child processes.

    It applies to a module that is imported already and to a later import; it does not import the
    module. Further calls change nothing.
    """
    # Not imported here: with `-e` alone the task is not known yet, and its import of torchaudio
    # needs compat.apply() first.
    patch_module(DATASET, _replace_cache_path, librosa())
    repeat_in_children(bypass_cache)


@contextlib.contextmanager
def cache_bypassed() -> Iterator[None]:
    """:func:`bypass_cache` for a ``with`` block, undone on exit, unless it was called before."""
    bypassed_before = _is_bypassed()
    bypass_cache()
    try:
        yield
    finally:
        if not bypassed_before:
            forget_in_children(bypass_cache)
            forget_import(DATASET)
            if _is_bypassed():
                module: Any = sys.modules[DATASET]
                module.CACHE_PATH = module.CACHE_PATH.path


def _is_bypassed() -> bool:
    return isinstance(getattr(sys.modules.get(DATASET), "CACHE_PATH", None), EmptyFolder)


def _replace_cache_path(module: Any) -> None:
    if _is_bypassed():
        return
    if not hasattr(module, "CACHE_PATH"):
        raise SetupError(
            f"{DATASET} has no CACHE_PATH, so its file lists may come from another corpus; install "
            "s3prl 0.4.18"
        )
    logger.debug("SID: searching for the audio files; cache %s is not used", module.CACHE_PATH)
    module.CACHE_PATH = EmptyFolder(module.CACHE_PATH)


def librosa() -> tuple[ModuleType, ...]:
    """Stand-ins for ``librosa`` and its ``util.find_files``, which imports librosa when called.

    The data sets of SID and ASV import this name, and no run calls it. librosa is not a dependency
    of s3prl, and needs numba and a compiler.
    """

    def find_files(*args, **kwargs):
        return importlib.import_module("librosa.util").find_files(*args, **kwargs)

    package, util = ModuleType("librosa"), ModuleType("librosa.util")
    vars(package)["util"], vars(util)["find_files"] = util, find_files
    return package, util
