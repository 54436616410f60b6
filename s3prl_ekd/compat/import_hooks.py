"""Hooks that run when a module is imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
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


def patch_module(
    name: str, patch: Callable[[ModuleType], None], stand_ins: Sequence[ModuleType] = ()
) -> None:
    """Call ``patch`` with the module ``name``: now if it is imported, else after its import.

    Args:
        stand_ins: modules that its import finds instead of installed ones.
    """

    def run_and_patch(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
        with _in_sys_modules(stand_ins):
            run(module)
        patch(module)

    module = sys.modules.get(name)
    if module is not None:
        patch(module)
    else:
        on_import(name, run_and_patch)


@contextlib.contextmanager
def _in_sys_modules(modules: Sequence[ModuleType]) -> Iterator[None]:
    names = [module.__name__ for module in modules]
    previous = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(zip(names, modules, strict=True))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(previous)


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
