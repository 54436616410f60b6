"""DistilHuBERT (arXiv 2110.01900) as a teacher: s3prl's ``DistillerModel`` without its heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from s3prl.upstream.distiller.model import DistillerModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..distill.conv_layers import stride_of
from ..distill.settings import StudentSettings
from ..distill.student import build_backbone, draw_layers
from ..distill.student_forward import student_forward
from ..errors import CheckpointError, ConfigError, EkdError, first_line
from ..files.config import build
from ..files.torch_load import build_limit

_HEADS = ("output_layer.", "task_embedding.")


class DistilHubertUpstream(nn.Module):
    """A ``DistillerModel`` as an upstream.

    Args:
        model: s3prl's model, with or without prediction heads; they are not asked.
    """

    def __init__(self, model: DistillerModel):
        super().__init__()
        self.model = model
        self.model.encoder.layerdrop = 0.0  # a dropped layer would be a missing hidden state

    def get_downsample_rates(self, key: str) -> int:
        """Samples a frame."""
        return stride_of(tuple(self.model.conv_layers))

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """Unpadded waveforms ``[sample]`` at 16 kHz -> ``hidden_states``.

        They are the projected features and each layer's output, ``[batch, frame, dim]``: s3prl's
        without the predictions behind them.
        """
        waves = pad_sequence(list(wavs), batch_first=True)  # [batch, sample]
        lengths = torch.tensor([len(wav) for wav in wavs], device=waves.device)
        layers = draw_layers(self.model.encoder)
        return {"hidden_states": student_forward(self.model, waves, lengths, layers).hidden_states}


def build_distilhubert(states: Mapping, path: Path) -> DistilHubertUpstream:
    """Build the upstream from the contents of a checkpoint of s3prl's distiller.

    s3prl's own builder unpickles whatever the file asks for and evaluates its conv layers; here
    the settings are checked first and the model gets values of ours.

    Raises:
        CheckpointError: a setting is not valid or not known here, or the weights do not fit.
    """
    config = states["Config"]["distiller"]
    for key, allowed in (
        ("attention_type", ("original",)),
        # "add" and "concat" mix task embeddings into the hidden states, one copy a task.
        ("task_emb_type", ("expand-last", "none", "self-hidden", "concat-last")),
    ):
        if config.get(key, allowed[0]) not in allowed:
            given = str(config[key])[:60]
            raise CheckpointError(
                f"{path}: the distiller's {key} is {given!r}; {' or '.join(allowed)} is known"
            )
    known = [field.name for field in fields(StudentSettings)]
    chosen = {name: config[name] for name in known if name in config}
    defaults = {"encoder_layers": 1, "feature_grad_mult": 1.0}  # s3prl's, where not ours
    try:
        settings = build(StudentSettings, {**defaults, **chosen}, "Config.distiller")
        weights = {k: v for k, v in states["Distiller"].items() if not k.startswith(_HEADS)}
        with build_limit(path):
            model = build_backbone(settings)
            model.load_state_dict(weights)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not load as a distiller checkpoint: {error}") from None
    except EkdError:
        raise
    except Exception as error:  # s3prl and torch raise whatever a damaged file makes them raise
        raise CheckpointError(
            f"{path} does not load as a distiller checkpoint: {first_line(error)}"
        ) from None
    return DistilHubertUpstream(model)
