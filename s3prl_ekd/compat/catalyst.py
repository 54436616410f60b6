"""``catalyst.data.sampler``, of which s3prl's recipe for KS needs one class."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

from .shim import Shim

MODULES = ("catalyst", "catalyst.data", "catalyst.data.sampler")


def _install() -> None:
    from torch.utils.data import DistributedSampler, Sampler

    class DistributedSamplerWrapper(DistributedSampler):
        """The part of another sampler's order that this process has under DDP."""

        def __init__(self, sampler: Sampler, shuffle: bool = True):
            super().__init__(sampler, shuffle=shuffle)  # type: ignore[arg-type]
            self.sampler = sampler

        def __iter__(self) -> Iterator[int]:
            order = list(self.sampler)
            return iter([order[i] for i in super().__iter__()])

    for name in MODULES:
        module = ModuleType(name, "s3prl_ekd's replacement for what s3prl uses of catalyst.")
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    setattr(sys.modules[MODULES[-1]], DistributedSamplerWrapper.__name__, DistributedSamplerWrapper)


CATALYST = Shim(
    name="catalyst.data.sampler",
    needed_by=("downstream/speech_commands/expert.py:12",),
    since="never a requirement of s3prl",
    summary="a sampler for KS on several GPUs",
    missing=lambda: "catalyst" not in sys.modules and importlib.util.find_spec("catalyst") is None,
    apply=_install,
)
