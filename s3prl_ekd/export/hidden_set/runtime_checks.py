"""Checks of a running hidden-set package, one function per check.

Each requests outputs from the package's process and checks them in this process. A check returns
its reason for passing, or raises CheckFailed, CheckWarning or CheckSkipped. Costs are counted as in
:mod:`...superb.cost`.
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
from .isolation import BLOCKED
from .messages import BadMessage, rebuild, text, texts, type_name
from .outcome import CheckFailed, CheckSkipped, CheckWarning

RATE = 16_000  # Hz
TASKS = ("PR", "SID", "ER", "ASR", "ASV", "SD", "QbE", "ST", "SS", "SE", "secret")
SECONDS = (2.0, 1.8, 3.7)  # of SUPERB's batch


class PackageError(Exception):
    """The package raised an exception; the message has its text and location.

    Attributes:
        type: the class name of the exception.
        module: the missing top-level module if it is a ModuleNotFoundError, else "".
    """

    def __init__(self, message: str, type: str, module: str):
        super().__init__(message)
        self.type, self.module = type, module


class RequestFn(Protocol):
    """Sends a request to the package's process and returns the reply, ``(facts, tensors)``."""

    def __call__(
        self, request: Mapping[str, Any], tensors: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Any], list[Tensor]]: ...


@dataclass
class ForwardResult:
    """Result of one forward.

    Attributes:
        result: lists, tuples, dicts, CPU tensors and :class:`.messages.OpaqueObject`, nested.
        waves: the waveforms after the forward.
        devices: original device of each tensor, keyed by its ``id``.
    """

    result: Any
    waves: list[Tensor]
    devices: Mapping[int, str]


@dataclass
class Package:
    """State shared by the checks.

    The first checks fill the other fields; later checks are skipped if a field they need is unset.

    Attributes:
        folder: folder of the package.
        lengths: lengths (samples) of the utterances for counting MACs, by bucket.
        send_request: sends a request to the process in which the package runs.
        offline: whether that process has no network.
    """

    folder: Path
    lengths: Mapping[str, Sequence[int]]
    send_request: RequestFn
    offline: bool = False
    weights_read: bool = False
    imported: bool = False
    built: bool = False
    result: Any = None  # of forward on SUPERB's batch
    cost: dict[str, Any] | None = None
    waves: list[Tensor] = field(default_factory=lambda: noise(*SECONDS))

    def facts(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the facts of the reply. Raises PackageError."""
        return self._request({"do": do, **request})[0]

    def forward(
        self, waves: list[Tensor], train: bool = False, device: str = "cpu"
    ) -> ForwardResult:
        """Run one forward without gradients, in train or eval mode.

        Raises:
            CheckSkipped: no model was built.
            PackageError: the package raised an exception.
        """
        if not self.built:
            raise CheckSkipped("no model: see the checks above")
        facts, tensors = self._request({"do": "forward", "train": train, "device": device}, waves)
        devices: dict[int, str] = {}
        waves_after = rebuild(facts.get("waves"), tensors, {})
        if not isinstance(waves_after, list) or not all(
            isinstance(wave, Tensor) for wave in waves_after
        ):
            raise BadMessage("a reply lacks the waveforms")
        return ForwardResult(rebuild(facts.get("result"), tensors, devices), waves_after, devices)

    def run(self, waves: list[Tensor], train: bool = False) -> list[Tensor]:
        """Run one forward and return all its hidden states, ``[batch, frame, dim]`` each.

        Raises:
            CheckSkipped: the result has another form, which another check reports.
        """
        return states_of(self.forward(waves, train).result)

    def rate(self, task: str = "secret") -> int:
        """Samples per frame. Raises CheckSkipped if it is not a positive int."""
        rate, _ = self.rate_or_text(task)
        if rate is None or rate <= 0:
            raise CheckSkipped("get_downsample_rates returns no valid rate: see rates")
        return rate

    def rate_or_text(self, task: str) -> tuple[int | None, str]:
        """Samples per frame, or None if get_downsample_rates returns no int; and a description."""
        if not self.built:
            raise CheckSkipped("no model: see the checks above")
        facts = self.facts("rate", task=task)
        rate = facts.get("rate")
        if rate is not None and type(rate) is not int:
            raise BadMessage("the frame rate in a reply is not an int")
        return rate, f"{text(facts.get('text'))}, a {text(facts.get('type'))}"

    def blocked(self, kind: str) -> list[str]:
        """Names of the ``hosts`` or ``packages`` to which access was blocked."""
        return texts(self.facts("blocked").get(kind))

    def _request(
        self, request: Mapping[str, Any], waves: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Any], list[Tensor]]:
        facts, tensors = self.send_request(request, waves)
        if "error" in facts:
            error, class_name = text(facts["error"]), text(facts.get("type"))
            raise PackageError(error, class_name, text(facts.get("module", "")))
        return facts, tensors


def states_of(result: Any) -> list[Tensor]:
    """All hidden states of all tasks, each once. Raises CheckSkipped, see :meth:`Package.run`."""
    if not isinstance(result, dict) or "hidden_states" not in result:
        raise CheckSkipped("forward returns no dict with hidden_states: see forward and lists")
    states_by_id: dict[int, Tensor] = {}
    for task in TASKS:
        states = result.get(task, result["hidden_states"])
        states = [states] if isinstance(states, Tensor) else states
        if not isinstance(states, (list, tuple)):
            raise CheckSkipped("hidden_states is not a list: see lists")
        for state in states:
            if not isinstance(state, Tensor) or state.dim() != 3:
                raise CheckSkipped("hidden states are not tensors [batch, frame, dim]: see lists")
            states_by_id[id(state)] = state
    return list(states_by_id.values())


def noise(*seconds: float) -> list[Tensor]:
    """Waveforms ``[sample]``, uniform in [0, 1) like those of SUPERB's check; fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(int(s * RATE), generator=generator) for s in seconds]


def require_frame_count(frames: int, samples: int, rate: int) -> None:
    """Raise CheckFailed if the count is off by 5 frames or more (SUPERB's tolerance)."""
    if abs(round(samples / rate) - frames) >= 5:
        raise CheckFailed(
            f"{frames} frames for {samples} samples; expected about {round(samples / rate)} at "
            f"{rate} samples per frame"
        )


def distance(reference: Tensor, other: Tensor, reduce: Callable = torch.max) -> float:
    """Largest (or mean) absolute difference, in standard deviations of ``reference``.

    Args:
        reduce: ``torch.max`` or ``torch.mean``.

    Returns:
        The difference; infinite if shapes differ or a value is not finite.
    """
    if reference.shape != other.shape:
        return math.inf
    if not reference.numel():
        return 0.0
    reference, other = reference.detach().double().cpu(), other.detach().double().cpu()
    scale = reference.std(unbiased=False).item() or 1.0
    result = (reduce((reference - other).abs()) / scale).item()
    return result if math.isfinite(result) else math.inf


def check_parameters(package: Package) -> str:
    cost = _cost(package)
    count = f"{cost['parameters']:,}"
    if cost["unused"]:
        raise CheckWarning(
            f"{count}, of which {cost['unused']:,} affect no hidden state (SUPERB counts them)"
        )
    return f"{count}, all used"


def check_macs(package: Package) -> str:
    cost = _cost(package)
    buckets = " + ".join(f"{value / 1e9:.3f}" for value in cost["macs_buckets"].values())
    return f"{cost['macs'] / 1e9:,.3f} G = {buckets} over {cost['utterances']} utterances"


def _cost(package: Package) -> dict[str, Any]:
    """The cost as in :func:`...superb.cost.measure_cost`, from counts of the package's process."""
    if not package.built:
        raise CheckSkipped("no model: see the checks above")
    if package.cost is None:
        facts = package.facts("cost")
        buckets = facts.get("macs_buckets")
        if not isinstance(buckets, dict) or list(buckets) != list(package.lengths):
            raise BadMessage("a reply does not have the MACs of each bucket")
        counts: dict[str, Any] = {
            key: facts.get(key) for key in ("parameters", "unused", "macs_products")
        }
        for count in (*counts.values(), *buckets.values()):
            if type(count) not in (int, float) or not (math.isfinite(count) and count >= 0):
                raise BadMessage("a count in a reply is not a finite number of at least 0")
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


def check_weights(package: Package) -> str:
    facts = package.facts("weights")
    if "problem" in facts:
        raise CheckFailed(
            f"model.pt does not load with weights_only=True: {text(facts['problem'])}"
        )
    package.weights_read = True
    type_text = f"a {text(facts.get('type'))}"
    return (
        type_text
        if facts.get("keys") is None
        else f"{type_text} with {', '.join(texts(facts['keys']))}"
    )


def check_import(package: Package) -> str:
    if not package.weights_read:
        raise CheckSkipped("model.pt did not load, so the package is not run: see weights")
    try:
        facts = package.facts("import")
    except PackageError as error:
        if not error.module:
            raise
        if error.module in package.blocked("packages"):
            raise CheckFailed(f"the package needs {error.module}: {error}") from None
        hint = f"{error.module} is not installed; type: pip install -r requirements.txt"
        raise CheckFailed(f"{error}; {hint}") from None
    file = facts.get("file")
    if not isinstance(file, str) or not file.startswith(str(package.folder)):
        raise CheckFailed(f"imported another module named expert: {text(file)}")
    package.imported = True
    blocked = ", ".join(package.blocked("packages"))
    return (
        f"works without {blocked}, which it tries to import"
        if blocked
        else f"imports none of {', '.join(BLOCKED)}"
    )


def check_build(package: Package) -> str:
    start = time.perf_counter()
    facts = _build(package, {})
    if facts.get("module") is not True:
        raise CheckFailed(
            f"UpstreamExpert is a {text(facts.get('type'))}, expected a torch.nn.Module"
        )
    return f"in {time.perf_counter() - start:.1f} s, from another working folder"


def check_keywords(package: Package) -> str:
    try:
        _build(package, {"model_config": None, "refresh": False, "of_a_later_s3prl": 1})
    except PackageError as error:
        if error.type == "TypeError":
            raise CheckFailed(f"add **kwargs to __init__: {error}") from None
        raise
    return "model_config, refresh and an unknown one"


def _build(package: Package, keywords: dict) -> dict:
    """Build an UpstreamExpert in the package's process."""
    if not package.imported:
        raise CheckSkipped("no UpstreamExpert: see import")
    facts = package.facts("build", keywords=keywords)
    package.built = package.built or facts.get("module") is True
    return facts


def check_forward(package: Package) -> str:
    package.result = package.forward(package.waves).result
    if not isinstance(package.result, dict):
        raise CheckFailed(f"forward returns a {type_name(package.result)}, expected a dict")
    return "a dict with " + ", ".join(package.result)


def check_lists(package: Package) -> str:
    result = _result(package)
    if "hidden_states" not in result:
        raise CheckFailed("the dict that forward returns has no key hidden_states")
    for task in TASKS:
        states = result.get(task, result["hidden_states"])
        name = task if task in result else "hidden_states"
        if not isinstance(states, list):
            raise CheckFailed(f"{name} is a {type_name(states)}, expected a list")
        if not states:
            raise CheckFailed(f"{name} is an empty list")
        for i, state in enumerate(states):
            if not isinstance(state, Tensor):
                raise CheckFailed(f"{name}[{i}] is a {type_name(state)}, expected a tensor")
            if state.dim() != 3:
                raise CheckFailed(
                    f"{name}[{i}] has shape {list(state.shape)}, expected [batch, frame, dim]"
                )
            if state.shape != states[0].shape:
                raise CheckFailed(
                    f"{name}[{i}] has shape {list(state.shape)}, expected that of {name}[0], "
                    f"{list(states[0].shape)}"
                )
        if len(states[0]) != len(package.waves):
            raise CheckFailed(
                f"{name} has batch size {len(states[0])} for {len(package.waves)} waveforms"
            )
    states = result["hidden_states"]
    tasks = [task for task in TASKS if task in result]
    extra = f"; separate lists for {', '.join(tasks)}" if tasks else ""
    return f"{len(states)} hidden states of {list(states[0].shape)}{extra}"


def check_rates(package: Package) -> str:
    tasks = {}
    for task in TASKS:
        rate, description = package.rate_or_text(task)
        if rate is None:
            raise CheckFailed(f"for {task} it returns {description}, expected an int")
        if rate <= 0:
            raise CheckFailed(f"for {task} it returns {rate}, expected a positive int")
        tasks[rate] = task
    return " and ".join(f"{rate} samples per frame" for rate in tasks)


def check_frames(package: Package) -> str:
    result = _result(package)
    samples = max(len(wave) for wave in package.waves)
    states: Any
    for task in TASKS:
        states = result.get(task, result.get("hidden_states"))
        if not isinstance(states, (list, tuple)) or not states:
            raise CheckSkipped("no list of hidden states: see lists")
        if not isinstance(states[0], Tensor) or states[0].dim() < 2:
            raise CheckSkipped("hidden states have no frames: see lists")
        require_frame_count(states[0].shape[1], samples, package.rate(task))
    return f"{states[0].shape[1]} frames for {samples} samples"


def _result(package: Package) -> dict:
    if not isinstance(package.result, dict):
        raise CheckSkipped("forward returned no dict: see forward")
    return package.result


TOLERANCE = 1e-3  # in standard deviations: float32 rounding error, accumulated over all layers


def check_values(package: Package) -> str:
    for i, state in enumerate(package.run(package.waves)):
        if state.dtype != torch.float32:
            raise CheckFailed(f"hidden state {i} is {state.dtype}, expected torch.float32")
        if torch.isnan(state).any():
            raise CheckFailed(f"hidden state {i} has NaN")
        if not torch.isfinite(state).all():
            raise CheckFailed(f"hidden state {i} has infinite values")
    return "finite float32"


def check_output_device(package: Package) -> str:
    output = package.forward(package.waves)
    for i, state in enumerate(states_of(output.result)):
        state_device = output.devices[id(state)]
        if torch.device(state_device).type != "cpu":
            raise CheckFailed(
                f"hidden state {i} is on {state_device}, the waveforms are on the CPU"
            )
    return "cpu"


def check_gpu(package: Package) -> str:
    if not package.built:
        raise CheckSkipped("no model: see the checks above")
    name = package.facts("cuda").get("name")
    if name is None:
        raise CheckSkipped("no CUDA device")
    expected = package.run(package.waves)
    output = package.forward(package.waves, device="cuda")
    states = states_of(output.result)
    devices = {output.devices[id(state)] for state in states}
    if any(not device.startswith("cuda") for device in devices):
        raise CheckFailed(
            f"hidden states are on {', '.join(sorted(devices))}, the waveforms on cuda"
        )
    largest = max(map(distance, expected, states), default=0.0)
    if not largest < 0.1:
        raise CheckFailed(
            f"hidden states differ from those on the CPU by {largest:.1e} standard deviations"
        )
    return f"{text(name)}: differs from the CPU by at most {largest:.1e} standard deviations"


def check_inputs(package: Package) -> str:
    waves_after = package.forward(package.waves).waves
    for i, (wave, original) in enumerate(zip(waves_after, package.waves, strict=True)):
        if not torch.equal(wave, original):
            raise CheckFailed(
                f"forward changes waveform {i} in place; the caller may still need it"
            )
    return "unchanged"


def check_repeat(package: Package) -> str:
    first, second = package.run(package.waves), package.run(package.waves)
    _same_count(first, second, "the second forward")
    largest = max(map(distance, first, second), default=0.0)
    if largest > 0:
        raise CheckFailed(
            f"two forwards in eval mode differ by {largest:.1e} standard deviations; is dropout or "
            "other randomness active?"
        )
    return "identical"


def check_modes(package: Package) -> str:
    waves = noise(0.5)
    expected = len(package.run(waves))
    counts = {len(package.run(waves, train=True)) for _ in range(10)}
    if counts != {expected}:
        raise CheckFailed(
            f"{expected} layers in eval mode, but {' or '.join(map(str, sorted(counts)))} in train "
            "mode (layer dropout?)"
        )
    return f"{expected} layers"


def check_order(package: Package) -> str:
    first = package.run(package.waves)
    second = package.run(package.waves[::-1])
    _same_count(first, second, "the reversed batch")
    largest = max(distance(a, b.flip(0)) for a, b in zip(first, second, strict=True))
    if not largest < TOLERANCE:
        raise CheckFailed(
            f"in the reversed batch, hidden states differ by {largest:.1e} standard deviations"
        )
    return f"differs by at most {largest:.0e} standard deviations"


def check_batching(package: Package) -> str:
    together = package.run(package.waves)
    maxima, means = [], []
    for i, wave in enumerate(package.waves):
        for alone, batched in zip(package.run([wave]), together, strict=True):
            count = alone.shape[1]
            if batched.shape[1] < count:
                raise CheckFailed(
                    f"waveform {i} has {count} frames alone, but {batched.shape[1]} in the batch"
                )
            maxima.append(distance(alone[0], batched[i, :count]))
            means.append(distance(alone[0], batched[i, :count], torch.mean))
    largest = max(maxima)
    if largest < TOLERANCE:
        return f"equal, within {largest:.0e} standard deviations"
    return (
        f"padding changes hidden states by up to {largest:.2g} standard deviations, "
        f"{sum(means) / len(means):.2g} on average"
    )


def check_length(seconds: float, package: Package) -> str:
    """Run one waveform of that length: finite hidden states with the expected frame count."""
    states = package.run(noise(seconds))
    for i, state in enumerate(states):
        if state.shape[1] == 0:
            raise CheckFailed(f"hidden state {i} has no frames")
        if not torch.isfinite(state).all():
            raise CheckFailed(f"hidden state {i} is not finite")
        require_frame_count(state.shape[1], int(seconds * RATE), package.rate())
    return f"{states[0].shape[1]} frames"


check_short, check_middle, check_long = (
    functools.partial(check_length, seconds) for seconds in (0.05, 1.0, 35.0)
)


def check_network(package: Package) -> str:
    hosts = package.blocked("hosts")
    if hosts:
        raise CheckFailed(
            f"network access to {', '.join(hosts[:5])}; SUPERB's machines may have no network"
        )
    scope = "" if package.offline else " by Python code; other code is not checked on this system"
    return f"none at import, build or forward{scope}"


def _same_count(first: list, second: list, second_name: str) -> None:
    """Raise CheckFailed if two forwards return different numbers of layers."""
    if len(first) != len(second):
        raise CheckFailed(f"{second_name} returns {len(second)} layers, the first {len(first)}")
