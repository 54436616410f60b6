"""Medians, ratios and the table of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .bench_clock import STAGES

STEP = "whole step"


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles on both sides of it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One stage of one side, over the turns.

    ``wall`` and ``cpu`` in seconds. ``ratio``: this side's wall time over the first side's in the
    same turn, ``cpu_ratio`` the same in CPU time, which other programs on the machine disturb less;
    None where the first side has no such stage. ``floor``: the seconds that its matrix products
    take at the machine's rate, for a batch of median size.
    """

    wall: Spread
    cpu: Spread
    ratio: Spread | None
    cpu_ratio: Spread | None
    floor: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, between neighbours in proportion."""
    low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """The spread of the ratios turn by turn; None where there is nothing to compare with."""
    if not all(value > 0 for value in theirs):
        return None
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def per_turn(turns: Sequence[Mapping[str, float]], stage: str) -> list[float]:
    """A stage's seconds in each turn; the whole step's are those of all stages."""
    if stage == STEP:
        return [sum(turn.values()) for turn in turns]
    return [turn[stage] for turn in turns]


def rows(result: Mapping) -> dict[str, dict[str, Row]]:
    """Side -> stage -> row, over all of :data:`STAGES` and the whole step."""
    first = next(iter(result["sides"].values()))
    rate = result["about"]["matrix_rate"]
    made = {}
    for name, side in result["sides"].items():
        # Operations were counted on one batch; the floor is that of a batch of median length.
        share = spread(side["audio"]).median / side["flops_audio"]
        flops = {**side["flops"], STEP: sum(side["flops"].values())}
        made[name] = {
            stage: Row(
                spread(per_turn(side["wall"], stage)),
                spread(per_turn(side["cpu"], stage)),
                *(
                    ratios(per_turn(side[time], stage), per_turn(first[time], stage))
                    for time in ("wall", "cpu")
                ),
                flops[stage] * share / rate,
            )
            for stage in (*STAGES, STEP)
        }
    return made


def audio_rate(side: Mapping) -> Spread:
    """Seconds of sound that a second of whole steps gets through."""
    steps = per_turn(side["wall"], STEP)
    return spread([audio / step for audio, step in zip(side["audio"], steps, strict=True)])


def stages(result: Mapping) -> list[str]:
    """The stages that there were: without ``--distort`` that one is an empty call."""
    return [stage for stage in STAGES if stage != "distort" or result["about"]["distort"]]


def summary(result: Mapping) -> dict:
    """What the JSON file has beside the measurements: the figures of the table."""
    return {
        name: {
            "stages": {stage: asdict(row) for stage, row in side.items()},
            "audio_seconds_per_second": asdict(audio_rate(result["sides"][name])),
        }
        for name, side in rows(result).items()
    }


def table(result: Mapping) -> str:
    """The benchmark in Markdown: a column a side, a line a stage, and what is behind them."""
    made, sides = rows(result), result["sides"]
    first, *others = made
    head = ["", *(f"{name}, ms (CPU)" for name in made)]
    for name in others:
        head += [f"{name} / {first}", "in CPU time"]
    head += [f"floor of {name}, ms" for name in made]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for stage in (*stages(result), STEP):
        cells = [f"**{stage}**" if stage == STEP else stage]
        cells += [_times(made[name][stage]) for name in made]
        for name in others:
            cells += [_ratio(made[name][stage].ratio), _ratio(made[name][stage].cpu_ratio)]
        cells += [f"{1e3 * made[name][stage].floor:,.1f}" for name in made]
        lines.append(cells)
    blank = [""] * (len(head) - 1 - len(made))
    rates = [f"{_three(audio_rate(sides[name]).median)}" for name in made]
    lines.append(["audio seconds a second", *rates, *blank])
    lines.append(["padding", *(f"{sides[name]['padding']:.1%}" for name in made), *blank])
    if any("difference" in side for side in sides.values()):
        cells = [_difference(side.get("difference")) for side in sides.values()]
        lines.append(["targets apart from eval mode's: largest (mean share)", *cells, *blank])
    if all("memory" in side for side in sides.values()):
        kind = next(iter(sides.values()))["memory"]["kind"]
        peaks = [f"{side['memory']['peak'] / 2**20:,.0f} MiB" for side in sides.values()]
        lines.append([f"peak memory ({kind})", *peaks, *blank])
    about = result["about"]
    note = (
        f"{about['size']}, {about['batch']} utterances of up to {about['longest_seconds']:g} s, "
        f"{about['turns']} turns, {about['device']}, {about['threads']} thread(s), torch "
        f"{about['torch']}; medians, ratios with quartiles; {about['matrix_rate'] / 1e9:,.0f} "
        "GFLOP/s in float32 matrix products"
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", note])


def _times(row: Row) -> str:
    return f"{1e3 * row.wall.median:,.1f} ({1e3 * row.cpu.median:,.1f})"


def _ratio(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _difference(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['largest']:.1e} ({found['share']:.1e})"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
