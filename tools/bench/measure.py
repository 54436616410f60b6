"""Measure the time, floating-point operations and memory of a step, and the matmul rate."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from s3prl_ekd.errors import SetupError

# In the order of a step. `loss` has all that no other stage has: masks, aggregation, transfers.
STAGES = ("data", "teacher forward", "student forward", "loss", "backward", "optimizer")


class StageTimer:
    """Sums a counter by stage; a nested stage is excluded from the stage around it.

    Args:
        read: returns the counter, which never decreases, such as seconds.

    Attributes:
        totals: ``{stage: amount}`` for all of :data:`STAGES`.
    """

    def __init__(self, read: Callable[[], float]):
        self.read = read
        self.totals = dict.fromkeys(STAGES, 0.0)
        self._open: list[str] = []
        self._last = 0.0

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._open.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @contextlib.contextmanager
    def method(self, owner: Any, name: str, stage: str) -> Iterator[None]:
        """Time the calls of an object's method within the block."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(stage):
                return original(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            delattr(owner, name)  # restores the method of the class

    def _charge(self) -> None:
        now = self.read()
        if self._open:
            self.totals[self._open[-1]] += now - self._last
        self._last = now


def clock(device: str, cpu_time: bool = False) -> Callable[[], float]:
    """Return a function that waits for the device and reads the time in seconds.

    Args:
        device: cpu, cuda or cuda:N.
        cpu_time: CPU time of this process in place of wall-clock time.
    """
    read = time.process_time if cpu_time else time.perf_counter

    def seconds() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return read()

    return seconds


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter with formulas for some operators that it lacks.

    It counts convolutions, matrix products and attention; a multiply-add is two operations.
    """
    aten, flash = torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"

    def product(_: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * prod(a) * b[-1]  # [batch, m, k] @ [batch, k, n], added in place

    def attention(*shapes: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(*shapes[:3])

    def attention_backward(*shapes: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(*shapes[:4])

    formulas: dict[Any, Callable[..., int]] = {aten.baddbmm_: product, aten.addmm_: product}
    if hasattr(aten, flash):
        formulas[getattr(aten, flash)] = attention
        formulas[getattr(aten, f"{flash}_backward")] = attention_backward
    return FlopCounterMode(display=False, custom_mapping=formulas)


def matmul_rate(device: str, repeats: int = 5, dtype: torch.dtype = torch.float32) -> float:
    """Highest measured FLOP/s of a matrix product: on a CPU of the size of a Base feed-forward, on
    a GPU so large that its start does not count."""
    m, k, n = (1600, 768, 3072) if device == "cpu" else (8192, 8192, 8192)
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype)
    seconds, best = clock(device), float("inf")
    for _ in range(repeats):
        begin = seconds()
        torch.mm(a, b)
        best = min(best, seconds() - begin)
    return 2 * m * k * n / best


def peak_memory(plan: Any, name: str) -> dict[str, Any]:
    """Measure the peak memory of two steps of a variant on its largest batch, in a new process.

    Returns:
        ``{"peak": bytes, "kind": "RSS" | "CUDA"}``, models included.

    Raises:
        SetupError: the process was killed, because memory ran out for example.
    """
    # Make glibc return freed tensors to the system, so that they do not count.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_two_steps, plan, name).result()
    except BrokenProcessPool:
        raise SetupError(f"the process that measures the memory of {name} was killed") from None


def _two_steps(plan: Any, name: str) -> dict[str, Any]:
    from .variants import VARIANTS

    variant = VARIANTS[name](plan)
    with contextlib.suppress(OSError):  # Linux: reset the peak after loading the models
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):  # the optimizer allocates its state in the first
        variant.step(0, StageTimer(lambda: 0.0))
    if plan.device.startswith("cuda"):
        return {"peak": torch.cuda.max_memory_allocated(plan.device), "kind": "CUDA"}
    return {"peak": peak_resident(), "kind": "RSS"}


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
