"""The least time that a step's matrix products take on this machine."""

from __future__ import annotations

import time
from math import prod

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


def _added_product(_, a, b, *args, out_shape=None, **kwargs) -> int:
    """``[batch, m, k]`` times ``[batch, k, n]``, added in place."""
    return 2 * prod(a) * b[-1]


def _attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad, q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def flop_counter() -> FlopCounterMode:
    """torch's counter, with the products that it does not know.

    Convolutions, matrix products and attention are counted, a multiplication and an addition as
    two; norms, activations and sums are not.
    """
    aten = torch.ops.aten
    known = {aten.baddbmm_: _added_product, aten.addmm_: _added_product}
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
    ):
        if hasattr(aten, name):
            known[getattr(aten, name)] = formula
    return FlopCounterMode(display=False, custom_mapping=known)


def matrix_rate(device: str, dtype: torch.dtype = torch.float32, tries: int = 5) -> float:
    """Floating point operations a second of this machine's matrix products, the best of a few.

    Products of the size of a Base teacher's feed-forward layer over 32 s of sound.
    """
    m, k, n = (1600, 768, 3072) if device == "cpu" else (16384, 1024, 4096)
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(tries):
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * m * k * n / best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
