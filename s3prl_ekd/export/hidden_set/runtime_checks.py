"""Checks of a running hidden-set package, one function a check.

First what SUPERB's own check does, then what that check does not see. Each asks the package's
process for outputs and decides here; costs are counted as :mod:`...superb.cost` counts them.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...superb.cost import PROFILER
from .messages import BadMessage, rebuild, text, texts, type_name
from .outcome import Failed, Skipped, Warned

RATE = 16_000  # Hz
TASKS = ("PR", "SID", "ER", "ASR", "ASV", "SD", "QbE", "ST", "SS", "SE", "secret")
SECONDS = (2.0, 1.8, 3.7)  # of the official batch


class PackageError(Exception):
    """The package raised an exception; the message is that exception's, and where.

    Attributes:
        type: the name of the exception's type.
        module: of a ModuleNotFoundError, the top module that is missing, else "".
    """

    def __init__(self, message: str, type: str, module: str):
        super().__init__(message)
        self.type, self.module = type, module


class Ask(Protocol):
    """Sends a request to the package's process and returns the answer, ``(facts, tensors)``."""

    def __call__(
        self, request: Mapping[str, Any], tensors: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Any], list[Tensor]]: ...


@dataclass
class Answer:
    """What one forward gave.

    Attributes:
        result: of plain lists, tuples, dicts, CPU tensors and :class:`.messages.Other`.
        waves: the waveforms after it.
        devices: the device that a tensor was on, by its ``id``.
    """

    result: Any
    waves: list[Tensor]
    devices: Mapping[int, str]


@dataclass
class Package:
    """What the checks share. Its other fields are filled by the first checks; those that need one
    that is not filled are skipped.

    Attributes:
        folder: of the package.
        lengths: of the utterances that MACs are counted over, by bucket.
        ask: reaches the process in which the package runs.
        offline: whether that process has no network at all.
    """

    folder: Path
    lengths: Mapping[str, Sequence[int]]
    ask: Ask
    offline: bool = False
    weights_read: bool = False
    imported: bool = False
    built: bool = False
    result: Any = None  # of the official forward
    cost: dict[str, Any] | None = None
    waves: list[Tensor] = field(default_factory=lambda: noise(*SECONDS))

    def facts(self, do: str, **request: Any) -> dict[str, Any]:
        """The facts that answer a request. Raises PackageError."""
        return self._ask({"do": do, **request})[0]

    def forward(self, waves: list[Tensor], train: bool = False, device: str = "cpu") -> Answer:
        """One forward without gradient, in train or eval mode.

        Raises:
            Skipped: there is no model.
            PackageError: it raises an exception.
        """
        if not self.built:
            raise Skipped("there is no model: see the checks above")
        facts, tensors = self._ask({"do": "forward", "train": train, "device": device}, waves)
        devices: dict[int, str] = {}
        after = rebuild(facts.get("waves"), tensors, {})
        if not isinstance(after, list) or not all(isinstance(wave, Tensor) for wave in after):
            raise BadMessage("an answer lacks the waveforms")
        return Answer(rebuild(facts.get("result"), tensors, devices), after, devices)

    def run(self, waves: list[Tensor], train: bool = False) -> list[Tensor]:
        """All hidden states of one forward, ``[batch, frame, dim]`` each.

        Raises:
            Skipped: the model's results are not of that kind, which another check says.
        """
        return states_of(self.forward(waves, train).result)

    def rate(self, task: str = "secret") -> int:
        """Samples a frame. Raises Skipped where that is no number."""
        rate, _ = self.rate_or_text(task)
        if rate is None or rate <= 0:
            raise Skipped("get_downsample_rates gives no frame rate: see rates")
        return rate

    def rate_or_text(self, task: str) -> tuple[int | None, str]:
        """What get_downsample_rates gives for a task: an int, or None and what it is instead."""
        if not self.built:
            raise Skipped("there is no model: see the checks above")
        facts = self.facts("rate", task=task)
        rate = facts.get("rate")
        if rate is not None and type(rate) is not int:
            raise BadMessage("an answer's frame rate is no int")
        return rate, f"{text(facts.get('text'))}, a {text(facts.get('type'))}"

    def refused(self, what: str) -> list[str]:
        """The ``hosts`` or ``packages`` that it has asked for and was refused."""
        return texts(self.facts("refused").get(what))

    def _ask(
        self, request: Mapping[str, Any], waves: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Any], list[Tensor]]:
        facts, tensors = self.ask(request, waves)
        if "error" in facts:
            error, kind = text(facts["error"]), text(facts.get("type"))
            raise PackageError(error, kind, text(facts.get("module", "")))
        return facts, tensors


def states_of(result: Any) -> list[Tensor]:
    """Every hidden state that some task gets, each once. Raises Skipped: see :meth:`Package.run`"""
    if not isinstance(result, dict) or "hidden_states" not in result:
        raise Skipped("forward gives no dict with hidden_states: see forward")
    found: dict[int, Tensor] = {}
    for task in TASKS:
        states = result.get(task, result["hidden_states"])
        states = [states] if isinstance(states, Tensor) else states
        if not isinstance(states, (list, tuple)):
            raise Skipped("hidden_states are no list: see lists")
        for state in states:
            if not isinstance(state, Tensor) or state.dim() != 3:
                raise Skipped("hidden_states are no tensors [batch, frame, dim]: see lists")
            found[id(state)] = state
    return list(found.values())


def noise(*seconds: float) -> list[Tensor]:
    """Waveforms ``[sample]`` between 0 and 1, as the official check makes them; always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(int(s * RATE), generator=generator) for s in seconds]


def check_frames(frames: int, samples: int, rate: int) -> None:
    """SUPERB's tolerance: less than 5 frames. Raises Failed."""
    if abs(round(samples / rate) - frames) >= 5:
        raise Failed(
            f"{frames} frames for {samples} samples; at {rate} samples a frame it would be "
            f"{round(samples / rate)}"
        )


def distance(first: Tensor, second: Tensor, of: Callable = torch.max) -> float:
    """The largest difference, or ``of`` all (``torch.mean``), in units of the first's deviation;
    infinite where not comparable."""
    if first.shape != second.shape:
        return math.inf
    if not first.numel():
        return 0.0
    first, second = first.detach().double().cpu(), second.detach().double().cpu()
    scale = first.std(unbiased=False).item() or 1.0
    found = (of((first - second).abs()) / scale).item()
    return found if math.isfinite(found) else math.inf


def parameters(package: Package) -> str:
    cost = _cost(package)
    text = f"{cost['parameters']:,}"
    if cost["unused"]:
        raise Warned(f"{text}, of which no hidden state needs {cost['unused']:,}: they count too")
    return f"{text}, all of them used"


def macs(package: Package) -> str:
    cost = _cost(package)
    buckets = " + ".join(f"{value / 1e9:.3f}" for value in cost["macs_buckets"].values())
    return f"{cost['macs'] / 1e9:,.3f} G = {buckets} over {cost['utterances']} utterances"


def _cost(package: Package) -> dict[str, Any]:
    """As :func:`...superb.cost.measure_cost` gives it, of the counts that the process sends."""
    if not package.built:
        raise Skipped("there is no model: see the checks above")
    if package.cost is None:
        facts = package.facts("cost")
        buckets = facts.get("macs_buckets")
        if not isinstance(buckets, dict) or list(buckets) != list(package.lengths):
            raise BadMessage("an answer has no MACs for each bucket")
        counts: dict[str, Any] = {
            key: facts.get(key) for key in ("parameters", "unused", "macs_products")
        }
        for count in (*counts.values(), *buckets.values()):
            if type(count) not in (int, float) or not (math.isfinite(count) and count >= 0):
                raise BadMessage("an answer has something else in the place of a count")
        package.cost = {
            "parameters": int(counts["parameters"]),
            "unused": int(counts["unused"]),
            "macs": sum(buckets.values()),
            "macs_buckets": buckets,
            "macs_products": float(counts["macs_products"]),
            "utterances": sum(map(len, package.lengths.values())),
            "profiler": PROFILER,
        }
    return package.cost


def weights(package: Package) -> str:
    facts = package.facts("weights")
    if "problem" in facts:
        raise Failed(
            f"model.pt is not plain data, and nothing is built from it: {text(facts['problem'])}"
        )
    package.weights_read = True
    kind = f"a {text(facts.get('type'))}"
    return kind if facts.get("keys") is None else f"{kind} with {', '.join(texts(facts['keys']))}"


def import_(package: Package) -> str:
    if not package.weights_read:
        raise Skipped("model.pt is not plain data, so nothing of the package is run")
    try:
        facts = package.facts("import")
    except PackageError as error:
        if not error.module:
            raise
        if error.module in package.refused("packages"):
            raise Failed(f"it needs {error.module}: {error}") from None
        hint = f"{error.module} is not installed here; pip install -r requirements.txt"
        raise Failed(f"{error}; {hint}") from None
    file = facts.get("file")
    if not isinstance(file, str) or not file.startswith(str(package.folder)):
        raise Failed(f"another module of the name expert is in the way: {text(file)}")
    package.imported = True
    refused = ", ".join(package.refused("packages"))
    return f"without {refused}, which it asked for" if refused else "asks for none of them"


def build(package: Package) -> str:
    start = time.perf_counter()
    facts = _build(package, {})
    if facts.get("module") is not True:
        raise Failed(f"UpstreamExpert gives a {text(facts.get('type'))}, no torch.nn.Module")
    return f"in {time.perf_counter() - start:.1f} s, from a folder elsewhere"


def keywords(package: Package) -> str:
    try:
        _build(package, {"model_config": None, "refresh": False, "of_a_later_s3prl": 1})
    except PackageError as error:
        if error.type == "TypeError":
            raise Failed(f"add **kwargs to __init__: {error}") from None
        raise
    return "model_config, refresh and one that there is not"


def _build(package: Package, keywords: dict) -> dict:
    if not package.imported:
        raise Skipped("there is no UpstreamExpert: see import")
    facts = package.facts("build", keywords=keywords)
    package.built = package.built or facts.get("module") is True
    return facts


def forward(package: Package) -> str:
    package.result = package.forward(package.waves).result
    if not isinstance(package.result, dict):
        raise Failed(f"forward gives a {type_name(package.result)}, not a dict")
    return "a dict with " + ", ".join(package.result)


def lists(package: Package) -> str:
    result = _result(package)
    if "hidden_states" not in result:
        raise Failed("there is no hidden_states in what forward gives")
    for task in TASKS:
        states = result.get(task, result["hidden_states"])
        name = task if task in result else "hidden_states"
        if not isinstance(states, list):
            raise Failed(f"{name} is a {type_name(states)}, not a list")
        if not states:
            raise Failed(f"{name} is an empty list")
        for i, state in enumerate(states):
            if not isinstance(state, Tensor):
                raise Failed(f"{name}[{i}] is a {type_name(state)}, not a tensor")
            if state.dim() != 3:
                raise Failed(
                    f"{name}[{i}] has {state.dim()} dimensions, {list(state.shape)}; "
                    "[batch, frame, dim] are needed"
                )
            if state.shape != states[0].shape:
                raise Failed(
                    f"{name}[{i}] is {list(state.shape)} and {name}[0] is {list(states[0].shape)}; "
                    "one shape is needed"
                )
        if len(states[0]) != len(package.waves):
            raise Failed(f"{name} has {len(states[0])} rows for {len(package.waves)} waveforms")
    states = result["hidden_states"]
    own = [task for task in TASKS if task in result]
    return f"{len(states)} of {list(states[0].shape)}" + (f", own for {own}" if own else "")


def rates(package: Package) -> str:
    found = {}
    for task in TASKS:
        rate, what = package.rate_or_text(task)
        if rate is None:
            raise Failed(f"for {task} it gives {what}; an int is needed")
        if rate <= 0:
            raise Failed(f"for {task} it gives {rate}")
        found[rate] = task
    return " and ".join(f"{rate} samples a frame" for rate in found)


def frames(package: Package) -> str:
    result = _result(package)
    samples = max(len(wave) for wave in package.waves)
    states: Any
    for task in TASKS:
        states = result.get(task, result.get("hidden_states"))
        if not isinstance(states, (list, tuple)) or not states:
            raise Skipped("there is no list of hidden states: see lists")
        if not isinstance(states[0], Tensor) or states[0].dim() < 2:
            raise Skipped("hidden states have no frames: see lists")
        check_frames(states[0].shape[1], samples, package.rate(task))
    return f"{states[0].shape[1]} for {samples} samples"


def _result(package: Package) -> dict:
    if not isinstance(package.result, dict):
        raise Skipped("forward gave no dict: see forward")
    return package.result


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
