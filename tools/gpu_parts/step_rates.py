"""Step rates, FLOP utilisation, memory, waits and largest kernels of the variants of a step."""

from __future__ import annotations

import functools
import gc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from s3prl_ekd.data.tables import read_tables

from ..bench.inputs import RATE, SIZES, TABLE, write_corpus, write_teachers
from ..bench.measure import StageTimer, clock, flop_counter, matmul_rate, peak_resident
from ..bench.report import quartiles
from ..bench.trainer_step import TrainerStep
from ..bench.variants import BenchPlan, S3prlVariant

BATCHES = 4  # in the corpus; a turn is one step on each


class S3prlStep:
    """A step of s3prl's distiller with several teachers; its audio is decoded once."""

    def __init__(self, plan: BenchPlan):
        self.variant = S3prlVariant(plan)
        self.variant.load = functools.cache(self.variant.load)

    def step(self, index: int) -> float:
        buckets = self.variant.buckets.X
        return self.variant.step(index % len(buckets), StageTimer(lambda: 0.0))[1]

    def read(self) -> None:
        pass


# A teacher's extractor, which runs once for teacher and student.
FROZEN: dict[str, Any] = {"student": {"train_extractor": False}}
COMPILED = {"runner": {"compile": True}, "teacher_compile": True}
BF16 = functools.partial(TrainerStep, precision="bfloat16")
# Name -> (number format of matrix products, step). The most important first: time may run out.
VARIANTS: dict[str, tuple[str, Callable[[BenchPlan], Any]]] = {
    "s3prl": ("float32", S3prlStep),
    "bf16": ("bfloat16", BF16),
    "bf16 cached int8": ("bfloat16", functools.partial(BF16, cache="int8")),
    "float32": ("float32", functools.partial(TrainerStep, precision="float32")),
    "TF32": ("tf32", functools.partial(TrainerStep, precision="tf32")),
    "bf16 frozen": ("bfloat16", functools.partial(BF16, init={"teacher": "hubert"}, **FROZEN)),
    "bf16 cached float16": ("bfloat16", functools.partial(BF16, cache="float16")),
    "bf16 compiled": ("bfloat16", functools.partial(BF16, **COMPILED)),
    "bf16 cached int8 compiled": ("bfloat16", functools.partial(BF16, cache="int8", **COMPILED)),
}
TOY: dict[str, tuple[str, Callable[[BenchPlan], Any]]] = {
    "s3prl": VARIANTS["s3prl"],
    "float32": VARIANTS["float32"],
    "cached int8": ("float32", functools.partial(TrainerStep, cache="int8")),
}


def base(folder: Path, device: str, toy: bool, save: Callable[[dict], None]) -> None:
    """Three Base teachers of random weights (toy: tiny ones) and a student of DistilHuBERT's
    size."""
    measure_all(folder, device, "tiny" if toy else "base", toy, save)


def tiny(folder: Path, device: str, toy: bool, save: Callable[[dict], None]) -> None:
    """Three tiny teachers and a tiny student."""
    measure_all(folder, device, "tiny", toy, save)


def measure_all(
    folder: Path, device: str, size: str, toy: bool, save: Callable[[dict], None]
) -> None:
    """Measure one variant after another; an error of one is recorded.

    The batch is halved after an out-of-memory error. Saves ``matmul_rates`` (FLOP/s by number
    format), ``cache_bytes`` (bytes per second of audio, by number format) and ``variants``: the
    result of :func:`measure`, with ``flops`` a second of audio, or an ``error``.
    """
    batch, seconds = (2, 0.5) if toy else (24, 15.0)
    write_corpus(folder, batch * BATCHES, seconds, shortest=0.9)
    plan = BenchPlan(folder, write_teachers(folder, SIZES[size]), size, device, batch)
    rows = read_tables(folder / "tables", [TABLE])
    audio = sum(row.length for row in rows) / RATE
    chosen = TOY if toy else VARIANTS
    result: dict[str, Any] = {"seconds": seconds, "matmul_rates": matmul_rates(device)}
    result["variants"] = {name: {"error": "not measured"} for name in chosen}
    for name, (numbers, make) in chosen.items():
        flops = result["variants"].get(name.removesuffix(" compiled"), {}).get("flops")
        record: dict[str, Any] = {}
        own = plan
        while not record:
            try:
                record = measure(make, own, flops, turns=2 if toy else 5)
            except Exception as error:  # of any kind: the other variants are still measured
                text = f"{type(error).__name__}: {error}"
                if "out of memory" in text and own.batch > 2:
                    own = replace(own, batch=own.batch // 2)
                else:
                    record = {"error": text[-500:]}
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
        result["variants"][name] = {**record, "batch": own.batch, "numbers": numbers}
        result["cache_bytes"] = {
            path.name.removeprefix("targets_"): sum(f.stat().st_size for f in path.iterdir())
            / audio
            for path in sorted(folder.glob("targets_*"))
        }
        save(result)


def measure(
    make: Callable[[BenchPlan], Any], plan: BenchPlan, flops: float | None, turns: int
) -> dict[str, Any]:
    """Measure a variant.

    Returns:
        ``rate``: quartiles over turns of seconds of audio per second. ``flops``: per second of
        audio; counted if not given. ``peak``: bytes. ``waits``: for the device, a step, and
        ``waits_at``: lines of code. ``kernels``: the five that take longest, with their share.
    """
    on_cuda, seconds = plan.device != "cpu", clock(plan.device)
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = False  # torch's defaults; a Trainer sets its own
    torch.backends.cudnn.allow_tf32 = True
    variant = make(plan)
    if flops is None:
        variant.step(0)
        with flop_counter() as counter:
            audio = variant.step(0)
        flops = counter.get_total_flops() / audio
    for index in range(2 * BATCHES):
        variant.step(index)
    variant.read()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    rates = []
    for _ in range(turns):
        begin = seconds()
        audio = sum(variant.step(index) for index in range(BATCHES))
        rates.append(audio / (seconds() - begin))
        variant.read()
    peak = torch.cuda.max_memory_allocated(plan.device) if on_cuda else peak_resident()
    waits, waits_at = count_waits(variant) if on_cuda else (None, [])
    return {
        "rate": quartiles(rates),
        "flops": flops,
        "peak": peak,
        "waits": waits,
        "waits_at": waits_at,
        "kernels": largest_kernels(variant, plan.device),
    }


def matmul_rates(device: str) -> dict[str, float]:
    """FLOP/s of a large matrix product, by number format."""
    rates = {"float32": matmul_rate(device)}
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = True
        rates["tf32"] = matmul_rate(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        rates["bfloat16"] = matmul_rate(device, dtype=torch.bfloat16)
    return rates


def count_waits(variant: Any) -> tuple[float, list[str]]:
    """How often a step waits for the GPU, and where most often; torch does not see all waits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for index in range(BATCHES):
                variant.step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    variant.read()
    lines = Counter(
        f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    )
    return lines.total() / BATCHES, [f"{line} ({n})" for line, n in lines.most_common(5)]


def largest_kernels(variant: Any, device: str) -> list[dict[str, Any]]:
    """The five kernels (CPU: operators) that take longest, with their share of all."""
    on_cuda = device != "cpu"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for index in range(2):
            variant.step(index)
        clock(device)()
    times = {}
    for event in profiler.key_averages():
        is_kernel = event.device_type == DeviceType.CUDA
        if is_kernel == on_cuda and not getattr(event, "is_user_annotation", False):
            times[event.key] = (
                event.self_device_time_total if on_cuda else event.self_cpu_time_total
            )
    total = sum(times.values()) or 1
    largest = sorted(times, key=lambda name: -times[name])[:5]
    return [{"name": name, "share": times[name] / total} for name in largest]
