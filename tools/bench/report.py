"""Table, projection and plot of the result of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .measure import STAGES

STEP = "whole step"
# DistilHuBERT's run (arXiv 2110.01900, section 3): 200,000 updates of 24 utterances of LibriSpeech,
# 12.3 s long on average; and one pass over the usual corpora. In hours of audio.
WORKLOADS = {
    "200,000 steps of 24 utterances": 200_000 * 24 * 12.3 / 3600,
    "one pass over LibriSpeech 960 h": 960,
    "one pass over Libri-Light 60k h": 60_000,
}
DEVICES = (1, 8, 32)


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


def quartiles(values: Sequence[float] | np.ndarray) -> Quartiles:
    """The 25th, 50th and 75th percentiles, interpolated."""
    return Quartiles(*map(float, np.percentile(values, [25, 50, 75])))


def seconds(variant: Mapping[str, Any], stage: str) -> np.ndarray:
    """A stage's seconds in each turn, ``[turn]``."""
    if stage == STEP:
        return np.sum([seconds(variant, name) for name in STAGES], axis=0)
    return np.array([turn[stage] for turn in variant["seconds"]])


def audio_rate(variant: Mapping[str, Any]) -> float:
    """Seconds of audio per second of whole steps, median over turns."""
    return float(np.median(np.array(variant["audio"]) / seconds(variant, STEP)))


def summary(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute the figures of the table: variant -> stage -> figures.

    ``seconds``: quartiles over turns. ``ratio``: quartiles of the ratios to the first variant in
    the same turn; None if the first variant lacks the stage. ``roofline``: seconds of the stage's
    floating-point operations at the rate of a large matrix product, for a median batch.
    """
    first = next(iter(result["variants"].values()))
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for name, variant in result["variants"].items():
        # Operations were counted on one batch; scale them to a batch of median length.
        scale = float(np.median(variant["audio"])) / variant["flops_audio"]
        flops = {**variant["flops"], STEP: sum(variant["flops"].values())}
        figures[name] = {}
        for stage in (*STAGES, STEP):
            times, reference = seconds(variant, stage), seconds(first, stage)
            figures[name][stage] = {
                "seconds": quartiles(times),
                "ratio": quartiles(times / reference) if reference.all() else None,
                "roofline": flops[stage] * scale / result["about"]["matmul_rate"],
            }
    return figures


def table(result: Mapping[str, Any]) -> str:
    """Format the result as a Markdown table, a line for each stage."""
    figures, variants, about = summary(result), result["variants"], result["about"]
    first, *compared = variants
    head = ["", *(f"{name}, ms" for name in variants)]
    head += [f"{name} / {first}" for name in compared]
    head += [f"roofline of {name}, ms" for name in variants]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for stage in (*STAGES, STEP):
        cells = [figures[name][stage] for name in variants]
        ratios = [cell["ratio"] for cell in cells[1:]]
        lines.append(
            [f"**{stage}**" if stage == STEP else stage]
            + [f"{1e3 * cell['seconds'].median:,.1f}" for cell in cells]
            + ["" if r is None else f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios]
            + [f"{1e3 * cell['roofline']:,.1f}" for cell in cells]
        )
    blank = [""] * (len(head) - 1 - len(variants))
    lines.append(
        [
            "seconds of audio per second",
            *(f"{audio_rate(v):,.3g}" for v in variants.values()),
            *blank,
        ]
    )
    memory = [variant.get("memory") for variant in variants.values()]
    if all(memory):
        peaks = [f"{record['peak'] / 2**20:,.0f} MiB" for record in memory]
        lines.append([f"peak memory ({memory[0]['kind']})", *peaks, *blank])
    note = (
        f"{about['size']}, {about['batch']} utterances of up to {about['longest_seconds']:g} s, "
        f"{about['turns']} turns, {about['device']}, {about['threads']} thread(s), torch "
        f"{about['torch']}; median {about['time']} times, ratios with quartiles; "
        f"{about['matmul_rate'] / 1e9:,.0f} GFLOP/s in a float32 matrix product"
    )
    return markdown(lines) + "\n\n" + note


def projection(result: Mapping[str, Any], name: str) -> str:
    """Project a variant's hours for larger corpora and more devices, as a Markdown table."""
    rate = audio_rate(result["variants"][name])
    lines = [[f"hours, {name}", *(f"{n} device{'s' * (n > 1)}" for n in DEVICES)]]
    lines.append(["---", *["---:"] * len(DEVICES)])
    for name, hours in WORKLOADS.items():
        lines.append([name, *(f"{hours / rate / n:,.1f}" for n in DEVICES)])
    return (
        markdown(lines)
        + "\n\nProjected from the measured rate, without synchronisation between devices."
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Join the cells of a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot the median milliseconds of the stages as stacked bars; the roofline is a dashed line.

    Raises:
        SetupError: matplotlib is not installed.
    """
    from s3prl_ekd.analysis.plots import new_figure
    from s3prl_ekd.superb.report_plots import COLOURS, add_legend

    figures = summary(result)
    names = list(figures)
    figure = new_figure(3.6 + 1.1 * len(names), 4.2)
    axis = figure.subplots()
    handles, bottom = {}, np.zeros(len(names))
    for stage, colour in zip(STAGES, COLOURS, strict=False):
        heights = 1e3 * np.array([figures[name][stage]["seconds"].median for name in names])
        handles[stage] = axis.bar(names, heights, 0.6, bottom=bottom, color=colour)
        bottom += heights
    for number, name in enumerate(names):
        roofline, span = 1e3 * figures[name][STEP]["roofline"], (number - 0.4, number + 0.4)
        handles["roofline"] = axis.hlines(roofline, *span, colors="black", linestyles="dashed")
    axis.set_ylabel("milliseconds per step")
    add_legend(figure, dict(reversed(handles.items())))
    figure.savefig(path, dpi=150)
