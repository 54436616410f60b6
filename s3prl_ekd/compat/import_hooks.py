"""Change a module as it is imported, whenever and by whomever that is."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Takes the module and the function that runs its code, which it must call.
ImportHook = Callable[[ModuleType, Callable[[ModuleType], None]], None]


def on_import(name: str, hook: ImportHook) -> None:
    """Have ``hook`` run the code of the module ``name`` once it is imported.

    A module that is imported already stays as it is. A second hook for a name replaces the first.
    """
    _FINDER.hooks[name] = hook
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def forget_import(name: str) -> None:
    """Undo :func:`on_import` for a module that is not imported yet."""
    _FINDER.hooks.pop(name, None)


class _Finder(MetaPathFinder):
    """Finds modules where Python would, and gives those with a hook another ``exec_module``."""

    def __init__(self) -> None:
        self.hooks: dict[str, ImportHook] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader  # this spec's own
        loader.exec_module = functools.partial(_call, self.hooks[fullname], loader.exec_module)
        return spec


def _call(hook: ImportHook, run: Callable[[ModuleType], None], module: ModuleType) -> None:
    hook(module, run)


_FINDER = _Finder()
