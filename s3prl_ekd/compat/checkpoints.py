"""Let ``torch.load`` with ``weights_only=True`` read the checkpoints of s3prl's runners.

A runner checkpoint holds tensors, plain values, the ``argparse.Namespace`` of the command line
and, after pretraining, the learning rate schedule of s3prl's optimizer. Since torch 2.6
``torch.load`` rejects the last two unless they are in torch's list of safe globals. This module
adds them to the list. Every other class in a checkpoint is still rejected.
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
    """The classes of a runner checkpoint that are not torch's; each call returns the same objects.

    The shim passes them to ``torch.serialization.add_safe_globals``. If you use the context manager
    ``safe_globals`` instead, leave out the classes that ``get_safe_globals()`` already has: on exit
    it removes all classes it was given, including those that the shim added.
    """
    from s3prl.optimizers import SCHEDULES

    schedules = tuple(dict.fromkeys(SCHEDULES.values()))
    return (argparse.Namespace, *schedules, *map(_alias, schedules))


def _alias(schedule: type) -> type:
    """An alias of the class ``schedule`` named ``optimizers.NAME``.

    This is the name in a checkpoint, because s3prl's pretrain runner imports its optimizers as the
    top-level module ``optimizers``. torch looks the name up in its list without an import, so the
    module need not exist. Instances are of the real class, so they can be saved again.
    """

    def new(cls: type) -> Any:
        return object.__new__(schedule)

    return type(schedule.__name__, (), {"__module__": "optimizers", "__new__": new})


class _UnlistedClass:
    """A class that is not among torch's safe globals."""


def weights_only_by_default() -> bool:
    """Whether ``torch.load`` without ``weights_only`` rejects classes outside the safe globals."""
    import torch

    buffer = io.BytesIO()
    torch.save(_UnlistedClass(), buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        # torch 2.5 warns of the new default; later versions, if an environment variable turns
        # weights_only off.
        warnings.simplefilter("ignore")
        try:
            torch.load(buffer)
        except pickle.UnpicklingError:
            return True
    return False


def torch_load_cves(version: str) -> str:
    """Known vulnerabilities of ``torch.load(weights_only=True)`` in a version of torch, as text.

    Empty if there are none.
    """
    from torch.torch_version import TorchVersion

    vulnerabilities = []
    if TorchVersion(version) < "2.6":
        vulnerabilities.append("run code (CVE-2025-32434)")
    if TorchVersion(version) < "2.10":
        vulnerabilities.append("overwrite memory (CVE-2026-24747)")
    return " and ".join(vulnerabilities)


def _unlisted() -> list[type]:
    import torch

    listed = torch.serialization.get_safe_globals()
    return [cls for cls in checkpoint_globals() if cls not in listed]


def _add_safe_globals() -> None:
    import torch

    torch.serialization.add_safe_globals([*_unlisted()])


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
    summary="argparse.Namespace and s3prl's schedules are allowed in a checkpoint",
    missing=lambda: weights_only_by_default() and bool(_unlisted()),
    apply=_add_safe_globals,
)
