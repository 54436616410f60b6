"""DistilHuBERT (arXiv 2110.01900) as a teacher: s3prl's ``DistillerModel`` without its heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from s3prl.upstream.distiller.model import DistillerModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..distill.conv_layers import stride_of
from ..distill.student import build_backbone, draw_layers
from ..distill.student_forward import student_forward
from ..distill.student_settings import StudentSettings
from ..errors import ConfigError
from ..files.config import from_plain_data

_HEADS = ("output_layer.", "task_embedding.")


class DistilHubertUpstream(nn.Module):
    """A ``DistillerModel`` as an upstream; its prediction heads, if any, are not used."""

    def __init__(self, model: DistillerModel):
        super().__init__()
        self.model = model
        self.model.encoder.layerdrop = 0.0  # layerdrop would remove hidden states

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return stride_of(tuple(self.model.conv_layers))

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """Compute ``hidden_states`` from unpadded waveforms ``[sample]`` at 16 kHz.

        They are the projected features and each layer's output, ``[batch, frame, dim]``: s3prl's
        list without the heads' predictions at its end.
        """
        waves = pad_sequence(list(wavs), batch_first=True)  # [batch, sample]
        lengths = torch.tensor([len(wav) for wav in wavs], device=waves.device)
        layers = draw_layers(self.model.encoder)
        return {"hidden_states": student_forward(self.model, waves, lengths, layers).hidden_states}


def build_distilhubert(states: Mapping) -> DistilHubertUpstream:
    """Build the upstream from the contents of a checkpoint of s3prl's distiller.

    s3prl's own builder unpickles any class and passes the conv layers to ``eval``. This one
    validates the settings first.

    Raises:
        ConfigError: a setting is not valid or not supported.
    """
    config = states["Config"]["distiller"]
    for key, allowed in (
        ("attention_type", ("original",)),
        # "add" and "concat" mix task embeddings into the hidden states, one copy for each task.
        ("task_emb_type", ("expand-last", "none", "self-hidden", "concat-last")),
    ):
        if config.get(key, allowed[0]) not in allowed:
            value = str(config[key])[:60]
            raise ConfigError(
                f"Config.distiller.{key} must be {' or '.join(allowed)}, got {value!r}"
            )
    values = {f.name: config[f.name] for f in fields(StudentSettings) if f.name in config}
    # s3prl's defaults that differ from those of StudentSettings
    defaults = {"encoder_layers": 1, "feature_grad_mult": 1.0}
    settings = from_plain_data(StudentSettings, {**defaults, **values}, "Config.distiller")
    model = build_backbone(settings)
    model.load_state_dict(
        {name: w for name, w in states["Distiller"].items() if not name.startswith(_HEADS)}
    )
    return DistilHubertUpstream(model)
