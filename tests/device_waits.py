"""Find on a CPU where code would make the host wait for a GPU."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The number of values in the result, or the value itself, is needed on the host.
WAITING = {
    aten._local_scalar_dense.default,  # item, float, int, bool, if, while
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
METHODS = ("tolist", "numpy", "cpu")


class DeviceWaits(TorchDispatchMode):
    """Count what would wait for the device if all tensors but ``host`` were on one.

    Used as a context, around forward, backward and update. Tensors computed from ``host`` tensors
    only are on the host, too. Not seen: ``.to("cpu")``, which is no operation on a CPU, and
    copies from the host's memory, which wait unless it is pinned; the test on CUDA sees these.

    Args:
        host: tensors that stay on the CPU, such as the lengths of a batch.

    Attributes:
        found: name of the operation and the line that called it, for each wait.
    """

    def __init__(self, host: Iterable[Tensor] = ()):
        super().__init__()
        self.found: list[str] = []
        self._host: dict[int, Any] = {}  # storages by address; kept, so that none is reused
        self._keep(host)

    def _keep(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._host[storage._cdata] = storage

    def on_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host

    def _add(self, name: str) -> None:
        lines = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
        self.found.append(f"{name}, {lines[-1].filename}:{lines[-1].lineno}")

    @staticmethod
    def _indexes_by_mask(func: Any, args: Sequence[Any]) -> bool:
        """Whether the number of selected values is needed; not for ``x[mask] = number``."""
        if func not in INDEXING or (func != aten.index.Tensor and args[2].numel() == 1):
            return False
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        host = bool(tensors) and all(map(self.on_host, tensors))
        if not host and (func in WAITING or self._indexes_by_mask(func, args)):
            self._add(str(func))
        result = func(*args, **(kwargs or {}))
        if host:
            self._keep(tree_leaves(result))
        return result

    def __enter__(self):
        self._original = {name: getattr(Tensor, name) for name in METHODS}
        for name, method in self._original.items():

            def counted(tensor, *args, name=name, method=method, **kwargs):
                if not self.on_host(tensor):
                    self._add(f"Tensor.{name}")
                return method(tensor, *args, **kwargs)

            setattr(Tensor, name, counted)
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self._original.items():
            setattr(Tensor, name, method)
        return super().__exit__(*error)
