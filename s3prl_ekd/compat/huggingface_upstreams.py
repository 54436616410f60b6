"""s3prl's Hugging Face upstreams without ``transformers`` until one of them is built.

``s3prl.hub`` imports every upstream, and two of them import transformers: most of the hub's import
time, and a third of its memory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .import_hooks import on_import

FAMILIES = ("hf_hubert", "hf_wav2vec2")


def import_transformers_late() -> None:
    """Import the ``expert`` modules of :data:`FAMILIES` when an upstream of theirs is built.

    It has no effect on families that are already imported.
    """
    for family in FAMILIES:
        on_import(f"s3prl.upstream.{family}.hubconf", _run_without_expert)


def _run_without_expert(hubconf: ModuleType, run: Callable[[ModuleType], None]) -> None:
    name = f"{hubconf.__package__}.expert"
    if name in sys.modules:
        return run(hubconf)

    def build_upstream(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(name).UpstreamExpert(*args, **kwargs)

    expert = ModuleType(name)  # only while hubconf takes UpstreamExpert from it
    vars(expert)["UpstreamExpert"] = build_upstream
    sys.modules[name] = expert
    try:
        return run(hubconf)
    finally:
        del sys.modules[name]
