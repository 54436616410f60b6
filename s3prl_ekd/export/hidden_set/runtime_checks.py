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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...superb.cost import PROFILER, hidden_states
from .isolation import BLOCKED
from .messages import BadMessage, Message, rebuild, text, texts, type_name
from .outcome import CheckFailed, CheckSkipped, CheckWarning

RATE = 16_000  # Hz
TASKS = ("PR", "SID", "ER", "ASR", "ASV", "SD", "QbE", "ST", "SS", "SE", "secret")
SECONDS = (2.0, 1.8, 3.7)  # of SUPERB's batch
TOLERANCE = 1e-3  # in standard deviations: float32 rounding error, accumulated over all layers


# Filled by :func:`check`, in the order of the report.
CHECKS: dict[str, Callable[[Package], str]] = {}
NEEDS: dict[str, tuple[str, ...]] = {}  # check -> those that have to pass before it runs


def check(name: str, *needs: str) -> Callable:
    """Decorator that adds a function to :data:`CHECKS` and :data:`NEEDS`."""

    def add(function: Callable[[Package], str]) -> Callable[[Package], str]:
        CHECKS[name], NEEDS[name] = function, needs
        return function

    return add


class PackageError(CheckFailed):
    """The package raised an exception; the message has its text and location.

    Attributes:
        type: the class name of the exception.
        module: the missing top-level module if it is a ModuleNotFoundError, else "".
    """

    def __init__(self, message: str, type: str, module: str):
        super().__init__(message)
        self.type, self.module = type, module


class ForwardResult(NamedTuple):
    """Result of one forward.

    ``result``: lists, tuples, dicts, CPU tensors and :class:`.messages.OpaqueObject`, nested.
    ``waves``: the waveforms after the forward. ``devices``: original device of each tensor, keyed
    by its ``id``.
    """

    result: Any
    waves: list[Tensor]
    devices: dict[int, str]


@dataclass
class Package:
    """State shared by the checks.

    Attributes:
        folder: folder of the package.
        lengths: lengths (samples) of the utterances for counting MACs, by bucket.
        send_request: sends a request (facts, tensors) to the process in which the package runs, and
            returns the reply.
        offline: whether that process has no network.
        output: of the first forward on SUPERB's batch, set by ``check_forward``.
        cost: set by the checks of parameters and MACs.
        waves: SUPERB's batch.
    """

    folder: Path
    lengths: Mapping[str, Sequence[int]]
    send_request: Callable[[Mapping[str, Any], Sequence[Tensor]], Message]
    offline: bool = False
    output: Any = None
    cost: dict[str, Any] | None = None
    waves: list[Tensor] = field(default_factory=lambda: noise(*SECONDS))

    def request(self, do: str, waves: Sequence[Tensor] = (), **request: Any) -> Message:
        """Send a request and return the reply. Raises PackageError."""
        facts, tensors = self.send_request({"do": do, **request}, waves)
        if "error" in facts:
            error, class_name = text(facts["error"]), text(facts.get("type"))
            raise PackageError(error, class_name, text(facts.get("module", "")))
        return facts, tensors

    def facts(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the facts of the reply. Raises PackageError."""
        return self.request(do, **request)[0]

    def forward(
        self, waves: list[Tensor], train: bool = False, device: str = "cpu"
    ) -> ForwardResult:
        """Run one forward without gradients, in train or eval mode. Raises PackageError."""
        facts, tensors = self.request("forward", waves, train=train, device=device)
        devices = texts(facts.get("devices"))
        if not len(devices) == len(tensors) >= len(waves):
            raise BadMessage("a reply lacks the waveforms or the devices of its tensors")
        return ForwardResult(
            rebuild(facts.get("result"), tensors),
            tensors[: len(waves)],
            {id(tensor): device for tensor, device in zip(tensors, devices, strict=True)},
        )

    def states(self, waves: list[Tensor], train: bool = False) -> list[Tensor]:
        """Run one forward and return all its hidden states, ``[batch, frame, dim]`` each."""
        return states_of(self.forward(waves, train))

    def rate(self, task: str = "secret") -> int:
        """Samples per frame. Raises CheckFailed if it is not a positive int."""
        facts = self.facts("rate", task=task)
        rate = facts.get("rate")
        if type(rate) is not int or rate <= 0:
            raise CheckFailed(
                f"for {task} get_downsample_rates returns {text(facts.get('text'))}, expected a "
                "positive int"
            )
        return rate

    def blocked(self, kind: str) -> list[str]:
        """Names of the ``hosts`` or ``packages`` to which access was blocked."""
        return texts(self.facts("blocked").get(kind))


def states_of(output: ForwardResult) -> list[Tensor]:
    """All hidden states of all tasks, each once.

    Raises:
        CheckSkipped: the result has another form, which another check reports.
    """
    try:
        states = hidden_states(output.result, TASKS)
    except (TypeError, KeyError, AttributeError):
        states = []
    if not states or not all(isinstance(state, Tensor) and state.dim() == 3 for state in states):
        raise CheckSkipped("forward returns no lists of hidden states: see forward and lists")
    return list({id(state): state for state in states}.values())


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
    reference, other = reference.double(), other.double()
    scale = reference.std(unbiased=False).item() or 1.0
    result = (reduce((reference - other).abs()) / scale).item()
    return result if math.isfinite(result) else math.inf


def largest_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest :func:`distance` between the layers of two forwards, which must be as many."""
    if len(first) != len(second):
        raise CheckFailed(f"{len(first)} hidden states in one forward, {len(second)} in another")
    return max(map(distance, first, second))


def require_device(output: ForwardResult, device: str) -> None:
    """Raise CheckFailed unless all hidden states were on ``device``."""
    devices = {output.devices[id(state)] for state in states_of(output)}
    if {name.split(":")[0] for name in devices} != {device}:
        names = ", ".join(sorted(devices))
        raise CheckFailed(f"hidden states are on {names}, the waveforms on {device}")


@check("weights")
def check_weights(package: Package) -> str:
    """model.pt loads as data (``weights_only=True``)."""
    facts = package.facts("weights")
    if "problem" in facts:
        raise CheckFailed(
            f"model.pt does not load with weights_only=True: {text(facts['problem'])}"
        )
    keys = "" if facts.get("keys") is None else f" with {', '.join(texts(facts['keys']))}"
    return f"a {text(facts.get('type'))}{keys}"


@check("import", "weights")
def check_import(package: Package) -> str:
    """``from expert import UpstreamExpert`` works without s3prl, fairseq and s3prl_ekd."""
    try:
        facts = package.facts("import")
    except PackageError as error:
        if not error.module:
            raise
        if error.module in package.blocked("packages"):
            raise CheckFailed(f"the package needs {error.module}: {error}") from None
        hint = f"{error.module} is not installed; type: pip install -r requirements.txt"
        raise CheckFailed(f"{error}; {hint}") from None
    if not str(facts.get("file")).startswith(str(package.folder)):
        raise CheckFailed(f"imported another module named expert: {text(facts.get('file'))}")
    blocked = ", ".join(package.blocked("packages"))
    if blocked:
        return f"works without {blocked}, which it tries to import"
    return f"imports none of {', '.join(BLOCKED)}"


@check("build", "import")
def check_build(package: Package) -> str:
    """UpstreamExpert is built on the CPU from model.pt."""
    start = time.perf_counter()
    facts = package.facts("build", keywords={})
    if facts.get("module") is not True:
        raise CheckFailed(
            f"UpstreamExpert is a {text(facts.get('type'))}, expected a torch.nn.Module"
        )
    return f"in {time.perf_counter() - start:.1f} s, from another working folder"


@check("keywords", "import")
def check_keywords(package: Package) -> str:
    """s3prl's and unknown keyword arguments are accepted."""
    keywords = {"model_config": None, "refresh": False, "of_a_later_s3prl": 1}
    try:
        package.facts("build", keywords=keywords)
    except PackageError as error:
        if error.type == "TypeError":
            raise CheckFailed(f"add **kwargs to __init__: {error}") from None
        raise
    return "model_config, refresh and an unknown one"


@check("forward", "build")
def check_forward(package: Package) -> str:
    """forward on waveforms of 2, 1.8 and 3.7 s returns a dict."""
    package.output = package.forward(package.waves)
    result = package.output.result
    if not isinstance(result, dict):
        raise CheckFailed(f"forward returns a {type_name(result)}, expected a dict")
    return "a dict with " + ", ".join(result)


@check("lists", "forward")
def check_lists(package: Package) -> str:
    """Each task has a list of tensors ``[batch, frame, dim]`` of the same shape."""
    result = package.output.result
    if "hidden_states" not in result:
        raise CheckFailed("the dict that forward returns has no key hidden_states")
    tasks = [task for task in TASKS if task in result]
    for name in ("hidden_states", *tasks):
        states = result[name]
        if not isinstance(states, list) or not states:
            kind = "an empty list" if isinstance(states, list) else f"a {type_name(states)}"
            raise CheckFailed(f"{name} is {kind}, expected a list of tensors")
        for i, state in enumerate(states):
            if not isinstance(state, Tensor):
                raise CheckFailed(f"{name}[{i}] is a {type_name(state)}, expected a tensor")
            if state.dim() != 3 or state.shape != states[0].shape:
                raise CheckFailed(
                    f"{name}[{i}] has shape {list(state.shape)}, expected [batch, frame, dim], as "
                    f"all of {name}"
                )
        if len(states[0]) != len(package.waves):
            raise CheckFailed(
                f"{name} has batch size {len(states[0])} for {len(package.waves)} waveforms"
            )
    states = result["hidden_states"]
    extra = f"; separate lists for {', '.join(tasks)}" if tasks else ""
    return f"{len(states)} hidden states of {list(states[0].shape)}{extra}"


@check("rates", "build")
def check_rates(package: Package) -> str:
    """get_downsample_rates returns an int for each task."""
    rates = {package.rate(task): None for task in TASKS}  # each once, in order
    return " and ".join(f"{rate} samples per frame" for rate in rates)


@check("frames", "lists", "rates")
def check_frames(package: Package) -> str:
    """The frame count matches that rate for the longest waveform, within 4 frames."""
    samples = max(len(wave) for wave in package.waves)
    result = package.output.result
    for task in TASKS:
        frames = result.get(task, result["hidden_states"])[0].shape[1]
        require_frame_count(frames, samples, package.rate(task))
    return f"{frames} frames for {samples} samples"


@check("values", "forward")
def check_values(package: Package) -> str:
    """Hidden states are finite float32."""
    for i, state in enumerate(states_of(package.output)):
        if state.dtype != torch.float32 or not torch.isfinite(state).all():
            raise CheckFailed(f"hidden state {i} ({state.dtype}) is not finite torch.float32")
    return "finite float32"


@check("device", "forward")
def check_output_device(package: Package) -> str:
    """Hidden states are on the device of the waveforms."""
    require_device(package.output, "cpu")
    return "cpu"


@check("gpu", "forward")
def check_gpu(package: Package) -> str:
    """Hidden states on a GPU agree with those on the CPU."""
    name = package.facts("cuda").get("name")
    if name is None:
        raise CheckSkipped("no CUDA device")
    output = package.forward(package.waves, device="cuda")
    require_device(output, "cuda")
    largest = largest_distance(states_of(package.output), states_of(output))
    difference = f"{text(name)}: differs from the CPU by up to {largest:.1e} standard deviations"
    if not largest < 0.1:
        raise CheckFailed(difference)
    return difference


@check("inputs", "forward")
def check_inputs(package: Package) -> str:
    """forward does not change the waveforms."""
    for i, (wave, original) in enumerate(zip(package.output.waves, package.waves, strict=True)):
        if not torch.equal(wave, original):
            raise CheckFailed(f"forward changes waveform {i}; the caller may still need it")
    return "unchanged"


@check("repeat", "forward")
def check_repeat(package: Package) -> str:
    """Two forwards in eval mode are identical."""
    largest = largest_distance(states_of(package.output), package.states(package.waves))
    if largest > 0:
        raise CheckFailed(
            f"two forwards in eval mode differ by {largest:.1e} standard deviations; is dropout or "
            "other randomness active?"
        )
    return "identical"


@check("modes", "build")
def check_modes(package: Package) -> str:
    """The same number of layers in train and eval mode."""
    waves = noise(0.5)
    expected = len(package.states(waves))
    counts = {len(package.states(waves, train=True)) for _ in range(10)}
    if counts != {expected}:
        raise CheckFailed(
            f"{expected} layers in eval mode, but {' or '.join(map(str, sorted(counts)))} in train "
            "mode (layer dropout?)"
        )
    return f"{expected} layers"


@check("order", "forward")
def check_order(package: Package) -> str:
    """The order of the batch does not change hidden states."""
    reversed_states = [state.flip(0) for state in package.states(package.waves[::-1])]
    largest = largest_distance(states_of(package.output), reversed_states)
    difference = f"the reversed batch differs by up to {largest:.0e} standard deviations"
    if not largest < TOLERANCE:
        raise CheckFailed(difference)
    return difference


@check("batching", "forward")
def check_batching(package: Package) -> str:
    """Compare the hidden states of an utterance alone and in a batch, for information."""
    together = states_of(package.output)
    maxima, means = [], []
    for i, wave in enumerate(package.waves):
        for alone, batched in zip(package.states([wave]), together, strict=True):
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
    """forward on one waveform: finite hidden states with the expected frame count."""
    states = package.states(noise(seconds))
    for i, state in enumerate(states):
        if state.shape[1] == 0 or not torch.isfinite(state).all():
            raise CheckFailed(f"hidden state {i} has no frames or is not finite")
        require_frame_count(state.shape[1], int(seconds * RATE), package.rate())
    return f"{states[0].shape[1]} frames"


for _seconds in (0.05, 1, 35):
    check(f"{_seconds:g} s", "build", "rates")(functools.partial(check_length, _seconds))


@check("network")
def check_network(package: Package) -> str:
    """No network access."""
    hosts = package.blocked("hosts")
    if hosts:
        raise CheckFailed(
            f"network access to {', '.join(hosts[:5])}; SUPERB's machines may have no network"
        )
    scope = "" if package.offline else " by Python code; other code is not checked on this system"
    return f"none at import, build or forward{scope}"


@check("parameters", "build")
def check_parameters(package: Package) -> str:
    """Parameter count, and how many are unused."""
    cost = _cost(package)
    count = f"{cost['parameters']:,}"
    if cost["unused"]:
        raise CheckWarning(
            f"{count}, of which {cost['unused']:,} affect no hidden state (SUPERB counts them)"
        )
    return f"{count}, all used"


@check("macs", "build")
def check_macs(package: Package) -> str:
    """MACs over SUPERB's 32 utterances."""
    cost = _cost(package)
    buckets = " + ".join(f"{value / 1e9:.3f}" for value in cost["macs_buckets"].values())
    return f"{cost['macs'] / 1e9:,.3f} G = {buckets} over {cost['utterances']} utterances"


def _cost(package: Package) -> dict[str, Any]:
    """The cost as in :func:`...superb.cost.measure_cost`, from counts of the package's process."""
    if package.cost is None:
        facts = package.facts("cost")
        buckets = facts.get("macs_buckets")
        counts = {key: facts.get(key) for key in ("parameters", "unused", "macs_products")}
        if not isinstance(buckets, dict) or list(buckets) != list(package.lengths):
            raise BadMessage("a reply does not have the MACs of each bucket")
        for count in (*counts.values(), *buckets.values()):
            if type(count) not in (int, float) or not 0 <= count < math.inf:
                raise BadMessage("a count in a reply is not a finite number of at least 0")
        package.cost = {
            **counts,
            "macs": sum(buckets.values()),
            "macs_buckets": buckets,
            "utterances": sum(map(len, package.lengths.values())),
            "profiler": PROFILER,
        }
    return package.cost
