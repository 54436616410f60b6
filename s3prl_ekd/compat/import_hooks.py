"""Hooks that run when a module is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Gets the module and the function that executes its code. The hook must call that function.
ImportHook = Callable[[ModuleType, Callable[[ModuleType], None]], None]


def on_import(name: str, hook: ImportHook) -> None:
    """Let ``hook`` execute the module ``name`` when it is imported.

    It has no effect on a module that is already imported. A second hook for a name replaces the
    first.
    """
    _FINDER.hooks[name] = hook
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def forget_import(name: str) -> None:
    """Remove the hook of :func:`on_import` from a module that is not imported yet."""
    _FINDER.hooks.pop(name, None)


class _Finder(MetaPathFinder):
    """Finds modules on Python's path and replaces ``exec_module`` of those with a hook."""

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
        hook, run = self.hooks[fullname], spec.loader.exec_module
        loader: Any = spec.loader  # PathFinder creates a new loader for each spec
        loader.exec_module = lambda module: hook(module, run)
        return spec


_FINDER = _Finder()
