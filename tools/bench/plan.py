"""From a measured rate to hours on a cluster: a projection, and marked as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .bench_report import audio_rate

# Hours of audio: LibriSpeech's training sets, Libri-Light's medium and large parts.
CORPORA = {"LibriSpeech 960 h": 960, "Libri-Light 6k h": 6_000, "Libri-Light 60k h": 60_000}
DEVICES = (1, 8, 32)
# DistilHuBERT's run (arXiv 2110.01900, section 3): 200,000 updates of 24 utterances of LibriSpeech,
# which are 12.3 s long on average.
STEPS, UTTERANCES, MEAN_SECONDS = 200_000, 24, 12.3


@dataclass(frozen=True)
class Projection:
    """``hours`` for each number of devices, if ``seconds`` of audio are worked through."""

    what: str
    seconds: float
    hours: tuple[float, ...]


def projections(rate: float, devices: Sequence[int] = DEVICES) -> list[Projection]:
    """One pass over each corpus, and the published run of 200,000 steps.

    Args:
        rate: measured, seconds of audio a second on one device.
        devices: how many there are.
    """
    work = {f"{STEPS:,} steps of {UTTERANCES} utterances": STEPS * UTTERANCES * MEAN_SECONDS}
    work |= {f"one pass over {name}": 3600.0 * hours for name, hours in CORPORA.items()}
    return [
        Projection(what, seconds, tuple(seconds / rate / count / 3600 for count in devices))
        for what, seconds in work.items()
    ]


def plan_table(result: Mapping, name: str, devices: Sequence[int] = DEVICES) -> str:
    """The projections for one side of a benchmark, in Markdown."""
    side = result["sides"][name]
    rate = audio_rate(side).median
    head = [f"hours, {name}", *(f"{n} device{'s' * (n > 1)}" for n in devices)]
    lines = [head, ["---", *["---:"] * len(devices)]]
    for each in projections(rate, devices):
        lines.append([each.what, *(_hours(hours) for hours in each.hours)])
    memory = ""
    if "memory" in side:
        memory = f", {side['memory']['peak'] / 2**30:.1f} GiB a device"
    note = (
        f"A projection, not a measurement: {rate:,.3g} audio seconds a second on one "
        f"{result['about']['device']}{memory}, times the number of devices; what they lose by "
        "waiting for each other is not in it."
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", note])


def _hours(hours: float) -> str:
    if hours >= 1000:
        return f"{hours:,.0f}"
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"
