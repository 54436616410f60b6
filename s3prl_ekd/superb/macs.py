"""Count the multiply-accumulates (MACs) of a forward, as SUPERB's leaderboard counts them.

The leaderboard's figures come from the profiling tool of the SLT 2022 challenge, a fork of
DeepSpeed's flops profiler. It counts

* matrix products and convolutions: one MAC for each multiplication;
* in ``torch.nn.functional.multi_head_attention_forward`` also the biases and the scaling of the
  projections (one MAC for each element), and for each attention weight one MAC for the mask, two
  for the softmax, and one for the dropout if there is any.

It does not count the softmax of any other attention, nor normalisations, activations, other biases
or residuals. With these rules HuBERT Base has exactly the 1,669,156,022,848 MACs that the tool's
authors print; its products alone have 1,665,522,780,160.

This module imports only torch.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

_ATTENTION = torch.nn.functional.multi_head_attention_forward
_ATEN = torch.ops.aten
# Products that torch's flop counter does not count: operator -> its factors' argument indices.
_UNREGISTERED = {
    _ATEN.addmm_: (1, 2),
    _ATEN.baddbmm_: (1, 2),
    _ATEN.addmv: (1, 2),
    _ATEN.mv: (0, 1),
    _ATEN.dot: (0, 1),
}


@dataclass
class MacCount:
    """MACs of matrix products and convolutions, and of attention's other terms."""

    products: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.products + self.attention


@contextlib.contextmanager
def count_macs() -> Iterator[MacCount]:
    """Count the MACs of all forwards in the ``with`` block.

    Products are counted by their shapes and not computed: their results are zeros, so that a large
    model takes seconds. The model's outputs in the block are meaningless.
    """
    counted = MacCount()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides nn.MultiheadAttention's products
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            _without_mkldnn(),
            sdpa_kernel(SDPBackend.MATH),
            _AttentionTerms(counted),
            _Products(counted),
        ):
            yield counted
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Disable oneDNN, which computes an LSTM in one operator and so hides its products."""
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # raised by setting the flags
    with torch.backends.mkldnn.flags(enabled=False):
        yield


class _Products(TorchDispatchMode):
    def __init__(self, counted: MacCount):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in _UNREGISTERED:
            first, second = (args[i] for i in _UNREGISTERED[packet])
            columns = second.shape[-1] if second.dim() > 1 else 1
            self.counted.products += first.numel() * columns
            return func(*args, **kwargs)
        if packet in flop_registry:
            result = _zeros_result(func, args, kwargs)
            self.counted.products += flop_registry[packet](*args, **kwargs, out_val=result) // 2
            return result
        if func is not torch.ops.prim.device.default:
            with self:  # count inside composite operators, which inference mode does not decompose
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class _AttentionTerms(TorchFunctionMode):
    def __init__(self, counted: MacCount):
        super().__init__()
        self.counted = counted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _ATTENTION:
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.counted.attention += _attention_terms(**bound.arguments)
        return func(*args, **(kwargs or {}))


def _attention_terms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    in_proj_bias: Tensor | None,
    dropout_p: float,
    **unused: Any,
) -> int:
    """MACs of one attention call other than its products; ``query`` is ``[frame, batch, dim]``."""
    bias = query.numel() + key.numel() + value.numel() if in_proj_bias is not None else 0
    batch = query.shape[1] if query.dim() == 3 else 1
    weights = batch * num_heads * query.shape[0] * key.shape[0]
    return bias + query.numel() + weights * (4 if dropout_p > 0 else 3)


def _zeros_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Zeros of the shape, dtype and device of the operator's result."""
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    try:
        meta = func(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args), **kwargs)
    except (NotImplementedError, RuntimeError):  # no meta kernel: compute the result
        return func(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda tensor: torch.zeros_like(tensor, device=device), meta)
