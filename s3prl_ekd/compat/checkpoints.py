"""Letting ``torch.load`` read what s3prl's runners save, without lifting its guard on pickles.

A runner checkpoint is tensors, plain values, the ``argparse.Namespace`` of the command line
and, after pretraining, the learning rate schedule inside s3prl's optimizer. Since torch 2.6
``torch.load`` refuses the last two unless they are named. Naming them is all that happens
here: every other class in a checkpoint is refused as before.
"""

from __future__ import annotations

import argparse
import functools
import io
import pickle
import warnings
from typing import Any

from .shim import Shim


@functools.cache
def checkpoint_globals() -> tuple[type, ...]:
    """The classes in a runner checkpoint that are not torch's; the same objects at every call.

    The shim gives them to ``torch.serialization.add_safe_globals``. For the context manager
    ``safe_globals``, leave out what ``get_safe_globals()`` already has: at its end it takes
    away all that it was given, and the shim's names with it.
    """
    from s3prl.optimizers import SCHEDULES

    schedules = tuple(dict.fromkeys(SCHEDULES.values()))
    return (argparse.Namespace, *schedules, *map(_as_in_file, schedules))


def _as_in_file(schedule: type) -> type:
    """A class under the name that the file may have for ``schedule``.

    s3prl's pretrain runner imports its optimizers as the top-level module ``optimizers``. torch
    looks the name up in its list and imports nothing, so no such module has to exist; what the
    class makes is an object of the real one, which can be saved again.
    """

    def new(cls: type) -> Any:
        return object.__new__(schedule)

    return type(schedule.__name__, (), {"__module__": "optimizers", "__new__": new})


class _NeverNamed:
    """Asks ``torch.load`` whether it refuses classes that nobody has named."""


def refuses_by_default() -> bool:
    """Whether ``torch.load`` refuses classes that nobody has named where nothing is said."""
    import torch

    buffer = io.BytesIO()
    torch.save(_NeverNamed(), buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.5 announces the change; others, our bypass
        try:
            torch.load(buffer)
        except pickle.UnpicklingError:
            return True
    return False


def loader_holes(version: str) -> str:
    """What a file can do to ``torch.load(weights_only=True)`` of a version of torch; empty where no
    such hole is known."""
    from torch.torch_version import TorchVersion

    holes = []
    if TorchVersion(version) < "2.6":
        holes.append("run code (CVE-2025-32434)")
    if TorchVersion(version) < "2.10":
        holes.append("overwrite memory (CVE-2026-24747)")
    return " and ".join(holes)


def _unnamed() -> list[type]:
    import torch

    named = torch.serialization.get_safe_globals()
    return [known for known in checkpoint_globals() if known not in named]


def _name_classes() -> None:
    import torch

    torch.serialization.add_safe_globals([*_unnamed()])


TORCH_LOAD = Shim(
    name="torch.load",
    needed_by=(
        "run_downstream.py:112",
        "run_downstream.py:171",
        "downstream/runner.py:91",
        "run_pretrain.py:83",
        "pretrain/runner.py:43",
    ),
    since="torch 2.6",
    summary="Namespace and s3prl's schedules may be in a checkpoint, and nothing else",
    missing=lambda: refuses_by_default() and bool(_unnamed()),
    apply=_name_classes,
)
