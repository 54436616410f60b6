"""The teachers: frozen upstreams and the layers that are predicted."""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterable, Mapping, Sequence, ValuesView
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import TeacherError
from .aggregation import TeacherShape, crop_frames
from .conv_extractor import Shared
from .student_settings import Samples

PROBE_SAMPLES = 16000  # one second at 16 kHz, to find the depth and width of an upstream
FIELD_SAMPLES = 4000  # a quarter of a second, to find the number of frames of an upstream
HiddenStates = Sequence[Tensor] | Mapping[int, Tensor]  # layer -> [batch, frame, dim]


class TeacherEncoder(Protocol):
    """A faster implementation of a teacher, which computes only the requested hidden states."""

    def hidden_states(
        self, waves: Tensor, lengths: Sequence[int], layers: Iterable[int], shared: Shared
    ) -> Mapping[int, Tensor]:
        """Layer -> hidden state ``[batch, frame, dim]`` in float32.

        Args:
            waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
            lengths: valid samples of each waveform; the largest is the width of ``waves``.
            layers: the layers to compute.
            shared: results that the encoders of several teachers share; empty for a new batch.
        """


class StatedOutputs(NamedTuple):
    """What an upstream returns; an upstream that cannot be run on noise has it as ``stated``.

    Attributes:
        widths: of each hidden state.
        stride: samples from one frame to the next.
        field: samples of the shortest waveform with one frame.
    """

    widths: tuple[int, ...]
    stride: int
    field: int


class Teacher(nn.Module):
    """A frozen s3prl upstream with the layers to predict.

    Args:
        upstream: maps a list of unpadded waveforms to a dict with ``hidden_states``.
        targets: layers, as indices into ``hidden_states`` (0 is the input of the first transformer
            layer), or groups of layers to average (SKILL, arXiv 2402.16830).
        name: name of the teacher, for messages.

    Raises:
        TeacherError: the upstream has no such layer, or the layers differ in width.
    """

    encoder: TeacherEncoder | None = None  # None: the upstream itself is run
    depth: int  # index of the last hidden state
    width: int  # of the targets
    stride: int  # samples from one frame to the next
    field: int  # samples of the shortest waveform with one frame

    def __init__(self, upstream: nn.Module, targets: Sequence[int | Sequence[int]], name: str):
        super().__init__()
        self.upstream = upstream.eval().requires_grad_(False)
        self.targets = tuple((t,) if isinstance(t, int) else tuple(t) for t in targets)
        stated: StatedOutputs | None = getattr(upstream, "stated", None)
        widths_of, self.stride, self.field = stated or measure_outputs(upstream)
        self.depth = last = len(widths_of) - 1
        layers = [layer for target in self.targets for layer in target]
        if max(layers) > last:
            raise TeacherError(
                f"teachers.{name}.layers: no layer {max(layers)}; {name} has layers 0 to {last}"
            )
        widths = {widths_of[layer] for layer in layers}
        if len(widths) > 1:
            raise TeacherError(
                f"teachers.{name}.layers: layers of different widths {widths}; use layers of one "
                "width"
            )
        self.width = widths.pop()

    @property
    def shape(self) -> TeacherShape:
        return TeacherShape(self.targets, self.width)

    @property
    def labels(self) -> list[str]:
        """Name of each target for logs: ``layer4``, or ``layers1-3`` for a group."""
        return [_label(target) for target in self.targets]

    def frames(self, samples: Samples) -> Samples:
        """Number of frames of unpadded waveforms with this many samples."""
        return (samples - self.field) // self.stride + 1

    def states(self, waves: Sequence[Tensor]) -> Sequence[Tensor]:
        """All hidden states, ``[batch, frame, dim]`` each, of unpadded waveforms ``[sample]``."""
        states: Sequence[Tensor] = self.upstream(list(waves))["hidden_states"]
        return states

    def forward(self, waves: Sequence[Tensor]) -> Tensor:
        """Unpadded waveforms ``[sample]`` at 16 kHz -> ``[batch, target, frame, dim]``."""
        return self.pick(self.states(waves))

    def pick(self, states: HiddenStates) -> Tensor:
        """Select and average hidden states: the targets ``[batch, target, frame, dim]``."""
        return torch.stack([_mean([states[i] for i in target]) for target in self.targets], dim=1)


@torch.no_grad()
def measure_outputs(upstream: nn.Module) -> StatedOutputs:
    """Run an upstream in eval mode on noise, to see what it returns."""
    noise = torch.randn(PROBE_SAMPLES, generator=torch.Generator().manual_seed(0))
    probe = upstream([noise])["hidden_states"]
    stride = int(cast(Any, upstream).get_downsample_rates("hidden_states"))
    field = probe_receptive_field(upstream, noise, stride)
    if (PROBE_SAMPLES - field) // stride + 1 != probe[-1].shape[1]:
        field = -PROBE_SAMPLES  # frames of another rule: none is masked
    return StatedOutputs(tuple(states.shape[-1] for states in probe), stride, field)


@torch.no_grad()
def probe_receptive_field(upstream: nn.Module, wave: Tensor, stride: int) -> int:
    """Samples ``f`` such that the upstream has ``(samples - f) // stride + 1`` frames.

    Found by bisection: the fewest samples that give as many frames as the first
    :data:`FIELD_SAMPLES` samples of ``wave [sample]``.
    """

    def frames(samples: int) -> int:
        return upstream([wave[:samples]])["hidden_states"][-1].shape[1]  # type: ignore[no-any-return]

    most = min(len(wave), FIELD_SAMPLES)
    low, high = most - stride, most  # low has fewer frames than high
    random_state = np.random.get_state()  # s3prl's encoders draw from it in eval mode, too
    count = frames(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if frames(middle) == count else (middle, high)
    np.random.set_state(random_state)
    return high - (count - 1) * stride


def _mean(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.stack(states).mean(0)


def _label(target: tuple[int, ...]) -> str:
    if len(target) == 1:
        return f"layer{target[0]}"
    first, last = min(target), max(target)
    if len(target) == last - first + 1:
        return f"layers{first}-{last}"
    return "layers" + "_".join(map(str, target))


class TeacherEnsemble(nn.ModuleDict):
    """The teachers by name, frozen; in eval mode even after ``train()``, unless ``dropout`` is set.

    Args:
        teachers: name -> teacher, in the order of the config.
        dropout: leave the teachers' dropout on in training, as s3prl's distiller does.
    """

    def __init__(self, teachers: Mapping[str, Teacher], dropout: bool = False):
        super().__init__()
        self.dropout = dropout
        self.update(teachers)

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Set train mode only if ``dropout`` is set, else eval mode."""
        super().train(mode and self.dropout)
        return self

    def __getitem__(self, name: str) -> Teacher:
        return cast(Teacher, super().__getitem__(name))

    def items(self) -> ItemsView[str, Teacher]:
        return cast("ItemsView[str, Teacher]", super().items())

    def values(self) -> ValuesView[Teacher]:
        return cast("ValuesView[Teacher]", super().values())

    @property
    def shapes(self) -> dict[str, TeacherShape]:
        return {name: teacher.shape for name, teacher in self.items()}

    @torch.no_grad()
    def states(
        self,
        waves: Sequence[Tensor],
        also: Mapping[str, Collection[int]] | None = None,
        shared: Shared | None = None,
    ) -> dict[str, HiddenStates]:
        """The hidden states of each teacher's target layers: teacher -> layer -> ``[batch, frame,
        dim]``.

        Computed in float32, under autocast too, because they become targets. Encoders have no
        dropout; with the teachers' dropout on, the upstreams are run.

        Args:
            waves: unpadded waveforms ``[sample]`` at 16 kHz.
            also: teacher -> layers to compute in addition to its target layers.
            shared: conv features of these waveforms, padded, that are there already.
        """
        states: dict[str, HiddenStates] = {}
        shared = {} if shared is None else shared
        padded = pad_sequence(list(waves), batch_first=True)  # [batch, sample]
        lengths = [len(wave) for wave in waves]
        with torch.autocast(waves[0].device.type, enabled=False):
            for name, teacher in self.items():
                if teacher.encoder is None or self.dropout:
                    states[name] = teacher.states(waves)
                    continue
                layers = {layer for target in teacher.targets for layer in target}
                layers.update((also or {}).get(name, ()))
                states[name] = teacher.encoder.hidden_states(padded, lengths, layers, shared)
        return states

    @torch.no_grad()
    def targets(self, states: Mapping[str, HiddenStates]) -> dict[str, Tensor]:
        """Select the targets ``{teacher: [batch, target, frame, dim]}``, of equal frames."""
        return crop_frames({name: teacher.pick(states[name]) for name, teacher in self.items()})

    def states_among(self, targets: Mapping[str, Tensor]) -> dict[str, HiddenStates]:
        """Recover hidden states from ``{teacher: [batch, target, frame, dim]}``, where a target is
        a single layer."""
        result: dict[str, HiddenStates] = {}
        for name, states in targets.items():
            layers = enumerate(self[name].targets)
            result[name] = {group[0]: states[:, i] for i, group in layers if len(group) == 1}
        return result

    def forward(self, waves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Waveforms ``[sample]`` at 16 kHz -> ``{teacher: [batch, target, frame, dim]}``."""
        return self.targets(self.states(waves))
