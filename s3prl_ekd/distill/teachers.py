"""The teachers: frozen upstreams, asked for some of their hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import TeacherShape, crop_frames

PROBE_SAMPLES = 16000  # one second at 16 kHz, to learn an upstream's depth and width


class Teacher(nn.Module):
    """One frozen s3prl upstream and the layers to be predicted.

    Args:
        upstream: maps a list of unpadded waveforms to a dict with ``hidden_states``.
        layers: indices into ``hidden_states``; 0 is the input of the first transformer layer.
        name: what messages call it.

    Raises:
        TeacherError: the upstream has no such layer.
    """

    def __init__(self, upstream: nn.Module, layers: Sequence[int], name: str):
        super().__init__()
        self.upstream = upstream.eval().requires_grad_(False)
        self.layers = tuple(layers)
        with torch.no_grad():
            noise = torch.randn(PROBE_SAMPLES, generator=torch.Generator().manual_seed(0))
            probe = upstream([noise])["hidden_states"]
        last = len(probe) - 1
        missing = [layer for layer in self.layers if layer > last]
        if missing:
            raise TeacherError(
                f"teachers.{name}.layers: there is no layer {missing[0]}; "
                f"{name} has layers 0 to {last}"
            )
        widths = {probe[layer].shape[-1] for layer in self.layers}
        if len(widths) > 1:
            raise TeacherError(f"teachers.{name}.layers: layers of several widths {widths}")
        self.width = widths.pop()
        self.depth = last
        self.stride = int(upstream.get_downsample_rates("hidden_states"))

    @property
    def shape(self) -> TeacherShape:
        return TeacherShape(self.layers, self.width)

    def forward(self, waves: Sequence[Tensor]) -> Tensor:
        """Unpadded waveforms ``[sample]`` at 16 kHz -> ``[batch, layer, frame, dim]``."""
        states = self.upstream(list(waves))["hidden_states"]
        return torch.stack([states[layer] for layer in self.layers], dim=1)


class TeacherEnsemble(nn.ModuleDict):
    """The teachers by name; always frozen, and in eval mode whatever ``train()`` is called with.

    Args:
        teachers: name -> teacher, in the order of the configuration.
        dropout: leave the teachers' dropout on in training, as s3prl's distiller does.
    """

    def __init__(self, teachers: Mapping[str, Teacher], dropout: bool = False):
        super().__init__(teachers)
        self.dropout = dropout

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Runners call this on everything they hold; only with ``dropout`` it is heard."""
        return super().train(mode and self.dropout)

    @property
    def shapes(self) -> dict[str, TeacherShape]:
        return {name: teacher.shape for name, teacher in self.items()}

    @torch.no_grad()
    def forward(self, waves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Waveforms ``[sample]`` at 16 kHz -> ``{teacher: [batch, layer, frame, dim]}``.

        Computed in float32 under autocast too: these are the targets.
        """
        with torch.autocast(waves[0].device.type, enabled=False):
            return crop_frames({name: teacher(waves) for name, teacher in self.items()})
