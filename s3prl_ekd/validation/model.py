"""The package under check, in its process: its class, its model, and how the checks run them."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .isolation import Watch
from .outcome import Failed, Skipped

RATE = 16_000  # Hz
TASKS = ("PR", "SID", "ER", "ASR", "ASV", "SD", "QbE", "ST", "SS", "SE", "secret")
SECONDS = (2.0, 1.8, 3.7)  # of the official batch


@dataclass
class Package:
    """What the checks share. ``expert``, ``model``, ``waves`` and ``result`` come with the first
    checks; those that find none are skipped."""

    folder: Path
    lengths: Mapping[str, Sequence[int]]  # of the utterances that MACs are counted over
    watch: Watch = field(default_factory=Watch)
    expert: type | None = None
    built: nn.Module | None = None
    waves: list[Tensor] = field(default_factory=list)
    result: Any = None
    cost: dict[str, Any] | None = None

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "model.pt")

    @property
    def model(self) -> nn.Module:
        if self.built is None:
            raise Skipped("there is no model: see the checks above")
        return self.built

    def run(self, waves: list[Tensor]) -> list[Tensor]:
        """All hidden states of one forward without gradient, ``[batch, frame, dim]`` each.

        Raises:
            Skipped: the model's results are not of that kind, which another check says.
        """
        with torch.no_grad():
            return states_of(self.model(waves))

    def rate(self, task: str = "secret") -> int:
        """Samples a frame. Raises Skipped where that is no number."""
        rate = self.model.get_downsample_rates(task)
        if not isinstance(rate, int) or rate <= 0:
            raise Skipped("get_downsample_rates gives no frame rate: see rates")
        return rate


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


def told(error: BaseException, folder: Path) -> str:
    """An exception of the package as one line, with the place in its own code."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    line = f"{type(error).__name__}: {first}" if first else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if folder in path.parents:
            return f"{line} ({path.relative_to(folder)} line {frame.lineno})"
    return line


def import_expert(folder: Path) -> type:
    """``UpstreamExpert`` as s3prl's Runner imports it: the folder at the end of the path."""
    sys.path.append(str(folder))
    from expert import UpstreamExpert

    return UpstreamExpert
