"""Patches of s3prl's modules, made when they are imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from .import_hooks import on_import


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
