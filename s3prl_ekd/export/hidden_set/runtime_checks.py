"""The package under check as the checks see it: what its process answers, and measures of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .messages import BadMessage, rebuild, text, texts
from .outcome import Failed, Skipped

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

    def _ask(self, request: Mapping[str, Any], tensors: Sequence[Tensor] = ()):
        facts, tensors = self.ask(request, tensors)
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
