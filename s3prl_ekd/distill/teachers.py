"""The teachers: frozen upstreams, asked for some of their hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import TeacherError
from .aggregation import TeacherShape, crop_frames

PROBE_SAMPLES = 16000  # one second at 16 kHz, to learn an upstream's depth and width


class Encoder(Protocol):
    """Another way to a teacher's hidden states, which computes only those asked for."""

    def hidden_states(
        self, waves: Tensor, lengths: Sequence[int], layers: Iterable[int], shared: dict
    ) -> Mapping[int, Tensor]:
        """Hidden states ``[batch, frame, dim]`` in float32 by their number.

        Args:
            waves: ``[batch, sample]`` at 16 kHz, 0 behind the end of each.
            lengths: valid samples of each, the longest of which is the batch's.
            layers: the numbers wanted.
            shared: empty for a new batch; what its encoders hand to each other.
        """


class Teacher(nn.Module):
    """One frozen s3prl upstream and the layers to be predicted.

    Args:
        upstream: maps a list of unpadded waveforms to a dict with ``hidden_states``.
        targets: layers, indices into ``hidden_states`` (0 is the input of the first transformer
            layer), or groups of layers, each of which is averaged (SKILL, arXiv 2402.16830).
        name: what messages call it.

    Attributes:
        encoder: a faster way to the same hidden states, or None: the upstream itself is run.

    Raises:
        TeacherError: the upstream has no such layer.
    """

    encoder: Encoder | None = None

    def __init__(self, upstream: nn.Module, targets: Sequence[int | Sequence[int]], name: str):
        super().__init__()
        self.upstream = upstream.eval().requires_grad_(False)
        self.targets = tuple((t,) if isinstance(t, int) else tuple(t) for t in targets)
        with torch.no_grad():
            noise = torch.randn(PROBE_SAMPLES, generator=torch.Generator().manual_seed(0))
            probe = upstream([noise])["hidden_states"]
        last = len(probe) - 1
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
        self.depth = last
        self.stride = int(upstream.get_downsample_rates("hidden_states"))

    @property
    def shape(self) -> TeacherShape:
        return TeacherShape(self.targets, self.width)

    @property
    def labels(self) -> list[str]:
        """A name for each target, for logs: ``layer4``, or ``layers1-3`` for a group."""
        return [_label(target) for target in self.targets]

    def states(self, waves: Sequence[Tensor]) -> Sequence[Tensor]:
        """All hidden states, ``[batch, frame, dim]`` each, of unpadded waveforms ``[sample]``."""
        return self.upstream(list(waves))["hidden_states"]

    def forward(self, waves: Sequence[Tensor]) -> Tensor:
        """Unpadded waveforms ``[sample]`` at 16 kHz -> ``[batch, target, frame, dim]``."""
        return self.pick(self.states(waves))

    def pick(self, states: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """The targets among hidden states by their number: ``[batch, target, frame, dim]``."""
        return torch.stack([_mean([states[i] for i in target]) for target in self.targets], dim=1)


def _mean(states: Sequence[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.stack(states).mean(0)


def _label(target: tuple[int, ...]) -> str:
    if len(target) == 1:
        return f"layer{target[0]}"
    first, last = min(target), max(target)
    if len(target) == last - first + 1:
        return f"layers{first}-{last}"
    return "layers" + "_".join(map(str, target))


def check_names(names: Iterable[str]) -> None:
    """Refuse teachers' names that torch's containers have for something else, such as ``half``.

    Raises:
        TeacherError: naming the first.
    """
    for name in names:
        if hasattr(TeacherEnsemble, name) or name in ("dropout", "kind", "training"):
            raise TeacherError(
                f"teachers: {name!r} cannot be a teacher's name, torch uses it; take another"
            )


class TeacherEnsemble(nn.ModuleDict):
    """The teachers by name; always frozen, and in eval mode whatever ``train()`` is called with.

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
        """Runners call this on everything they hold; only with ``dropout`` it is heard."""
        return super().train(mode and self.dropout)

    @property
    def shapes(self) -> dict[str, TeacherShape]:
        return {name: teacher.shape for name, teacher in self.items()}

    @torch.no_grad()
    def states(
        self, waves: Sequence[Tensor], also: Mapping[str, int] | None = None
    ) -> dict[str, Sequence[Tensor] | Mapping[int, Tensor]]:
        """The hidden states behind each teacher's targets, by their number.

        Computed in float32 under autocast too: these are the targets. With the teachers' dropout on
        no encoder is asked, as none has dropout.

        Args:
            waves: waveforms ``[sample]`` at 16 kHz.
            also: one more layer of a teacher, by its name.
        """
        states, padded, shared = {}, None, {}
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
    def targets(
        self, states: Mapping[str, Sequence[Tensor] | Mapping[int, Tensor]]
    ) -> dict[str, Tensor]:
        """The targets among them: ``{teacher: [batch, target, frame, dim]}``, of equal frames."""
        return crop_frames({name: teacher.pick(states[name]) for name, teacher in self.items()})

    def forward(self, waves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Waveforms ``[sample]`` at 16 kHz -> ``{teacher: [batch, target, frame, dim]}``."""
        return self.targets(self.states(waves))
