"""What a package may do that SUPERB's own check does not see, one function a check."""

from __future__ import annotations

import functools

import torch

from .messages import text
from .outcome import Failed, Skipped
from .runtime_checks import RATE, Package, check_frames, distance, noise, states_of

TOLERANCE = 1e-3  # of a layer's deviation: float32 sums in another order, over all its layers


def values(package: Package) -> str:
    for i, state in enumerate(package.run(package.waves)):
        if state.dtype != torch.float32:
            raise Failed(f"hidden state {i} is {state.dtype}; torch.float32 is needed")
        if torch.isnan(state).any():
            raise Failed(f"hidden state {i} has NaN")
        if not torch.isfinite(state).all():
            raise Failed(f"hidden state {i} has infinite values")
    return "finite float32"


def device(package: Package) -> str:
    answer = package.forward(package.waves)
    for i, state in enumerate(states_of(answer.result)):
        place = answer.devices[id(state)]
        if torch.device(place).type != "cpu":
            raise Failed(f"hidden state {i} is on {place}, the waveforms are on the CPU")
    return "cpu"


def gpu(package: Package) -> str:
    if not package.built:
        raise Skipped("there is no model: see the checks above")
    name = package.facts("cuda").get("name")
    if name is None:
        raise Skipped("there is no CUDA device here")
    expected = package.run(package.waves)
    answer = package.forward(package.waves, device="cuda")
    states = states_of(answer.result)
    where = {answer.devices[id(state)] for state in states}
    if any(not place.startswith("cuda") for place in where):
        raise Failed(f"hidden states are on {', '.join(sorted(where))}, the waveforms on cuda")
    largest = max(map(distance, expected, states), default=0.0)
    if not largest < 0.1:
        raise Failed(f"hidden states differ from the CPU's by {largest:.1e} deviations")
    return f"{text(name)}, {largest:.1e} deviations from the CPU"


def inputs(package: Package) -> str:
    after = package.forward(package.waves).waves
    for i, (wave, before) in enumerate(zip(after, package.waves, strict=True)):
        if not torch.equal(wave, before):
            raise Failed(f"forward changes waveform {i} in place, which other code still needs")
    return "unchanged"


def repeat(package: Package) -> str:
    first, second = package.run(package.waves), package.run(package.waves)
    _same_count(first, second, "a second pass")
    largest = max(map(distance, first, second), default=0.0)
    if largest > 0:
        raise Failed(
            f"two passes in eval mode differ by {largest:.1e} deviations: dropout, or other chance"
        )
    return "identical"


def modes(package: Package) -> str:
    waves = noise(0.5)
    expected = len(package.run(waves))
    counts = {len(package.run(waves, train=True)) for _ in range(10)}
    if counts != {expected}:
        raise Failed(
            f"{expected} layers in eval mode and {' or '.join(map(str, sorted(counts)))} in train "
            "mode: layers are dropped, or added"
        )
    return f"{expected} layers"


def order(package: Package) -> str:
    first = package.run(package.waves)
    second = package.run(package.waves[::-1])
    _same_count(first, second, "another order")
    largest = max(distance(a, b.flip(0)) for a, b in zip(first, second, strict=True))
    if not largest < TOLERANCE:
        raise Failed(f"the reversed batch differs by {largest:.1e} deviations")
    return f"differences up to {largest:.0e} deviations"


def batching(package: Package) -> str:
    together = package.run(package.waves)
    found, means = [], []
    for i, wave in enumerate(package.waves):
        for alone, batched in zip(package.run([wave]), together, strict=True):
            count = alone.shape[1]
            if batched.shape[1] < count:
                raise Failed(
                    f"waveform {i} alone has {count} frames, in the batch {batched.shape[1]}"
                )
            found.append(distance(alone[0], batched[i, :count]))
            means.append(distance(alone[0], batched[i, :count], torch.mean))
    largest = max(found)
    if largest < TOLERANCE:
        return f"the same, to {largest:.0e} deviations"
    return (
        f"they differ by up to {largest:.2g} deviations, {sum(means) / len(means):.2g} on average: "
        "padding is not without effect"
    )


def length(seconds: float, package: Package) -> str:
    """One waveform of that length alone: no crash, the right count of frames, finite."""
    states = package.run(noise(seconds))
    for i, state in enumerate(states):
        if state.shape[1] == 0:
            raise Failed(f"hidden state {i} has no frame")
        if not torch.isfinite(state).all():
            raise Failed(f"hidden state {i} is not finite")
        check_frames(state.shape[1], int(seconds * RATE), package.rate())
    return f"{states[0].shape[1]} frames"


short, middle, long = (functools.partial(length, seconds) for seconds in (0.05, 1.0, 35.0))


def network(package: Package) -> str:
    hosts = package.refused("hosts")
    if hosts:
        raise Failed(f"it asks for {', '.join(hosts[:5])}; SUPERB's machines may have no network")
    only = "" if package.offline else " by Python code; other code is not followed on this system"
    return f"nothing was asked for, at import, build or forward{only}"


def _same_count(first: list, second: list, what: str) -> None:
    if len(first) != len(second):
        raise Failed(f"{what} gives {len(second)} layers, the first {len(first)}")
