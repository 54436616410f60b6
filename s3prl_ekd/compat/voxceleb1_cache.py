"""SID's list of files, searched anew for each data set instead of taken from s3prl's cache.

s3prl's ``downstream/voxceleb1/dataset.py`` keeps the paths it found as pickles in its own folder
(``.cache/train.pkl`` …). Their names do not say which corpus they came from, so the next corpus
would silently be trained on the files of the one before; and whoever can write into that folder
could have any code run, because that is what reading a pickle means. Nothing in the YAML turns
the cache off. So the module is changed as it is imported: each data set gets a folder of its own,
which is new, private and gone at exit, and in which there never is anything to read.

The price is the search itself at each start: about 10 s for the 153 516 files of VoxCeleb1 on a
local disk.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ..errors import SetupError
from .child_processes import forget_in_children, repeat_in_children
from .import_hooks import forget_import, on_import

logger = logging.getLogger(__name__)

DATASET = "s3prl.downstream.voxceleb1.dataset"


class FreshFolder(os.PathLike):
    """A path that is another new, empty folder each time it is asked for, in place of ``path``."""

    def __init__(self, path: str | os.PathLike = "") -> None:
        self.path = path
        self._root: tempfile.TemporaryDirectory | None = None

    def __fspath__(self) -> str:
        if self._root is None:
            self._root = tempfile.TemporaryDirectory(prefix="s3prl_ekd_sid_")
        return tempfile.mkdtemp(dir=self._root.name)


def guard() -> None:
    """Keep s3prl's SID data set off its cache, whenever this process or a child imports it.

    Costs nothing where SID is not run. Calling it twice changes nothing.
    """
    if DATASET in sys.modules:
        _without_cache(sys.modules[DATASET])
    else:
        # Importing it now would do too, but `-e` alone does not say that the task is SID, and the
        # import of torchaudio needs compat first.
        on_import(DATASET, _run_and_change)
    repeat_in_children(guard)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within it the cache is not used; see :func:`guard`."""
    guard()
    try:
        yield
    finally:
        forget_in_children(guard)
        forget_import(DATASET)
        module: Any = sys.modules.get(DATASET)
        folder = getattr(module, "CACHE_PATH", None)
        if isinstance(folder, FreshFolder):
            module.CACHE_PATH = folder.path


def _run_and_change(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
    with _lazy_librosa():
        run(module)
    _without_cache(module)


def _without_cache(module: Any) -> None:
    if isinstance(getattr(module, "CACHE_PATH", None), FreshFolder):
        return
    if not hasattr(module, "CACHE_PATH"):
        raise SetupError(
            f"this s3prl's {DATASET} has no CACHE_PATH, so its file lists may be those of another "
            "corpus; install s3prl 0.4.18"
        )
    logger.debug("file lists are searched anew; %s is not read", module.CACHE_PATH)
    module.CACHE_PATH = FreshFolder(module.CACHE_PATH)


@contextlib.contextmanager
def _lazy_librosa() -> Iterator[None]:
    """Inside, ``librosa.util.find_files`` is there and imports librosa only once it is called.

    The data set imports that name and never calls it; librosa is no dependency of s3prl, and
    brings numba and a compiler with it.
    """

    def find_files(*args, **kwargs):
        return importlib.import_module("librosa.util").find_files(*args, **kwargs)

    names = ("librosa", "librosa.util")
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    package, util = map(ModuleType, names)
    vars(package)["util"], vars(util)["find_files"] = util, find_files
    sys.modules.update(zip(names, (package, util), strict=True))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
