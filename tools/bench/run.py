"""A benchmark of whole distillation steps: turns, one after another, of each side."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .. import __version__, compat
from ..errors import SetupError
from ..teachers.random_weights import SIZES, write_teachers
from .bench_clock import STAGES, Clock, seconds
from .bench_corpus import write_corpus
from .bench_floor import flop_counter, matrix_rate
from .bench_memory import peak_memory
from .bench_sides import SIDES, Baseline, Ours, Plan, audio_seconds, copy_weights, padding_share

logger = logging.getLogger(__name__)


def run_bench(
    folder: Path,
    *,
    size: str,
    device: str,
    longest: float,
    batch: int,
    turns: int,
    sides: Sequence[str],
    source: Path | None = None,
    distort: bool = False,
    memory: bool = True,
) -> dict:
    """Measure; everything it needs is written into ``folder``.

    In each turn every side makes one step on the same batch; their order changes from turn to turn.
    One turn before the first is not counted.

    Args:
        folder: an empty one.
        size: one of ``SIZES``.
        device: ``cpu`` or ``cuda``.
        longest: seconds of the longest utterance.
        batch: utterances a batch, 2 at least.
        turns: that are counted.
        sides: of ``SIDES``; the first is what the others are compared with.
        source: a folder of audio; None: noise.
        distort: let ours distort the waveforms too.
        memory: measure the peak memory of each side, in a process of its own.

    Returns:
        ``about`` the machine and what was measured, and ``sides``: for each the seconds of each
        stage and turn (``wall``, ``cpu``), the operations of each stage (``flops``, on the longest
        batch, and of ``flops_audio`` seconds), ``audio`` seconds of each turn, ``losses``,
        ``padding``, ``memory``, and for ours the ``difference`` of its targets.

    Raises:
        EkdError: the source has too little audio, or a side cannot run.
    """
    compat.apply()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError("--device cuda: torch sees no CUDA device here; use --device cpu")
    write_corpus(folder, batch * turns, longest, source)
    plan = Plan(folder, write_teachers(folder, SIZES[size]), size, device, batch, distort)
    found = {name: {} for name in sides}
    if memory:  # first: on a GPU the measuring process would have its share otherwise
        for name in tqdm(sides, desc="peak memory", unit="side"):
            found[name]["memory"] = peak_memory(plan, name)
    made = {name: SIDES[name](plan) for name in sides}
    _same_weights(list(made.values()))
    for name, side in made.items():
        _run(side, 0, seconds(device))
        found[name] |= _operations(side)
        if isinstance(side, Ours):
            found[name]["difference"] = side.difference()
        found[name] |= {"wall": [], "cpu": [], "audio": [], "losses": []}
    lengths = {name: [] for name in sides}
    rate = 0.0  # the best of all turns: what else runs on the machine may slow some of them
    for turn in tqdm(range(turns), desc="turns", unit="turn"):
        rate = max(rate, matrix_rate(device))
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            spent, loss, each = _run(made[name], turn % len(made[name]), seconds(device))
            found[name]["wall"].append({stage: spent[stage][0] for stage in STAGES})
            found[name]["cpu"].append({stage: spent[stage][1] for stage in STAGES})
            found[name]["audio"].append(audio_seconds(each))
            found[name]["losses"].append(loss)
            lengths[name].append(each)
    for name in sides:
        found[name]["padding"] = padding_share(lengths[name])
    about = {
        "made_by": f"s3prl_ekd {__version__}",
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "size": size,
        "batch": batch,
        "longest_seconds": longest,
        "turns": turns,
        "distort": distort,
        "matrix_rate": rate,
    }
    return {"about": about, "sides": found}


def _run(side, index: int, read) -> tuple[dict, float, torch.Tensor]:
    clock = Clock(read)
    loss, lengths = side.step(index, clock)
    spent = {stage: clock.spent[stage] for stage in STAGES}  # 0 where a side has no such stage
    return spent, loss, lengths


def _operations(side) -> dict:
    """What the longest batch costs in floating point operations, stage by stage."""
    counter = flop_counter()
    with counter:
        spent, _, lengths = _run(side, 0, lambda: (float(counter.get_total_flops()),))
    flops = {stage: spent[stage][0] for stage in STAGES}
    return {"flops": flops, "flops_audio": audio_seconds(lengths)}


def _same_weights(sides: list) -> None:
    ours = next((side for side in sides if isinstance(side, Ours)), None)
    for side in sides:
        if ours is not None and isinstance(side, Baseline):
            copy_weights(ours, side)
