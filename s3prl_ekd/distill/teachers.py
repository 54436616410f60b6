"""The teachers: frozen upstreams, asked for some of their hidden states."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Mapping, Sequence, ValuesView
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import TeacherError
from .aggregation import TeacherShape, crop_frames

PROBE_SAMPLES = 16000  # one second at 16 kHz, to learn an upstream's depth and width
HiddenStates = Sequence[Tensor] | Mapping[int, Tensor]  # [batch, frame, dim], by their number


class Encoder(Protocol):
    """A faster way to a teacher's hidden states, which computes only those asked for."""

    def hidden_states(
        self, waves: Tensor, lengths: Sequence[int], layers: Iterable[int], shared: dict[Any, Any]
    ) -> Mapping[int, Tensor]:
        """Hidden states ``[batch, frame, dim]`` in float32 by their number.

        Args:
            waves: ``[batch, sample]`` at 16 kHz, 0 behind the end of each.
            lengths: valid samples of each, the longest of which is the batch's.
            layers: numbers of hidden states.
            shared: empty for each batch; for what several teachers' encoders have in common.
        """


class Teacher(nn.Module):
    """One frozen s3prl upstream and its layers that are predicted.

    Args:
        upstream: maps a list of unpadded waveforms to a dict with ``hidden_states``.
        targets: layers, indices into ``hidden_states`` (0 is the input of the first transformer
            layer), or groups of layers, each of which is averaged (SKILL, arXiv 2402.16830).
        name: of the teacher, in messages.

    Attributes:
        encoder: a faster way to the same hidden states; None runs the upstream itself.
        width: dimensions of a target.
        depth: number of the last hidden state.
        stride: samples from one frame to the next.

    Raises:
        TeacherError: the upstream has no such layer, or the layers differ in width.
    """

    encoder: Encoder | None = None

    def __init__(self, upstream: nn.Module, targets: Sequence[int | Sequence[int]], name: str):
        super().__init__()
        self.upstream = upstream.eval().requires_grad_(False)
        self.targets = tuple((t,) if isinstance(t, int) else tuple(t) for t in targets)
        with torch.no_grad():
            noise = torch.randn(PROBE_SAMPLES, generator=torch.Generator().manual_seed(0))
            probe = upstream([noise])["hidden_states"]
        self.depth = last = len(probe) - 1
        layers = [layer for target in self.targets for layer in target]
        missing = [layer for layer in layers if layer > last]
        if missing:
            raise TeacherError(
                f"teachers.{name}.layers: there is no layer {missing[0]}; "
                f"{name} has layers 0 to {last}"
            )
        widths = {probe[layer].shape[-1] for layer in layers}
        if len(widths) > 1:
            raise TeacherError(f"teachers.{name}.layers: layers of several widths {widths}")
        self.width = widths.pop()
        self.stride = int(cast(Any, upstream).get_downsample_rates("hidden_states"))

    @property
    def shape(self) -> TeacherShape:
        return TeacherShape(self.targets, self.width)

    @property
    def labels(self) -> list[str]:
        """A name for each target, for logs: ``layer4``, or ``layers1-3`` for a group."""
        return [_label(target) for target in self.targets]

    def states(self, waves: Sequence[Tensor]) -> Sequence[Tensor]:
        """All hidden states, ``[batch, frame, dim]`` each, of unpadded waveforms ``[sample]``."""
        states: Sequence[Tensor] = self.upstream(list(waves))["hidden_states"]
        return states

    def forward(self, waves: Sequence[Tensor]) -> Tensor:
        """Unpadded waveforms ``[sample]`` at 16 kHz -> ``[batch, target, frame, dim]``."""
        return self.pick(self.states(waves))

    def pick(self, states: HiddenStates) -> Tensor:
        """Hidden states by their number -> the targets, ``[batch, target, frame, dim]``."""
        return torch.stack([_mean([states[i] for i in target]) for target in self.targets], dim=1)


def _mean(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.stack(states).mean(0)


def _label(target: tuple[int, ...]) -> str:
    if len(target) == 1:
        return f"layer{target[0]}"
    first, last = min(target), max(target)
    if len(target) == last - first + 1:
        return f"layers{first}-{last}"
    return "layers" + "_".join(map(str, target))


def check_names(names: Iterable[str]) -> None:
    """Reject teachers' names that are attributes of torch's containers, such as ``half``.

    Raises:
        TeacherError: naming the first.
    """
    for name in names:
        if hasattr(TeacherEnsemble, name) or name in ("dropout", "kind", "training"):
            raise TeacherError(
                f"teachers: {name!r} cannot be a teacher's name, torch uses it; take another"
            )


class TeacherEnsemble(nn.ModuleDict):
    """The teachers by name; always frozen, and in eval mode even after ``train()``.

    Args:
        teachers: name -> teacher, in the order of the configuration.
        dropout: leave the teachers' dropout on in training, as s3prl's distiller does.
    """

    def __init__(self, teachers: Mapping[str, Teacher], dropout: bool = False):
        super().__init__()
        self.dropout = dropout
        check_names(teachers)
        self.update(teachers)

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Set train mode, if ``dropout`` asks for it; else eval mode, whatever ``mode`` is."""
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
        self, waves: Sequence[Tensor], also: Mapping[str, int] | None = None
    ) -> dict[str, HiddenStates]:
        """The hidden states behind each teacher's targets, by their number.

        Computed in float32 under autocast too: these are the targets. Encoders have no dropout, so
        with the teachers' dropout on, the upstreams are run.

        Args:
            waves: waveforms ``[sample]`` at 16 kHz.
            also: teacher -> one more layer of it.
        """
        states: dict[str, HiddenStates] = {}
        shared: dict[Any, Any] = {}
        padded: Tensor | None = None
        with torch.autocast(waves[0].device.type, enabled=False):
            for name, teacher in self.items():
                if teacher.encoder is None or self.dropout:
                    states[name] = teacher.states(waves)
                    continue
                if padded is None:
                    padded = pad_sequence(list(waves), batch_first=True)  # [batch, sample]
                lengths = [len(wave) for wave in waves]
                layers = {layer for target in teacher.targets for layer in target}
                layers |= {also[name]} if also and name in also else set()
                states[name] = teacher.encoder.hidden_states(padded, lengths, layers, shared)
        return states

    @torch.no_grad()
    def targets(self, states: Mapping[str, HiddenStates]) -> dict[str, Tensor]:
        """Hidden states -> ``{teacher: [batch, target, frame, dim]}``, of equal frames."""
        return crop_frames({name: teacher.pick(states[name]) for name, teacher in self.items()})

    def states_among(self, targets: Mapping[str, Tensor]) -> dict[str, HiddenStates]:
        """The hidden states that are targets by themselves, and not in a group of layers only.

        Args:
            targets: ``{teacher: [batch, target, frame, dim]}``.
        """
        return {
            name: {
                layers[0]: states[:, i]
                for i, layers in enumerate(self[name].targets)
                if len(layers) == 1
            }
            for name, states in targets.items()
        }

    def forward(self, waves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Waveforms ``[sample]`` at 16 kHz -> ``{teacher: [batch, target, frame, dim]}``."""
        return self.targets(self.states(waves))
