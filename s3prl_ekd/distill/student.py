"""The student: s3prl's ``DistillerModel`` without its heads."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from dataclasses import dataclass

import torch
from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel
from torch import Tensor, nn

from .conv_layers import conv_layers_text
from .settings import StudentSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudentOutput:
    """What one forward gives.

    ``features``: conv features ``[batch, frame, channel]``. ``hidden_states``: the projected
    features and each transformer layer's output, ``[batch, frame, dim]`` each. ``last``: the
    encoder's output, which the heads read; it is the last hidden state unless the layers normalise
    first. ``mask``: ``[batch, frame]``, 1 where a frame is valid, 0 where it is padding.
    """

    features: Tensor
    hidden_states: list[Tensor]
    last: Tensor
    mask: Tensor


def build_backbone(settings: StudentSettings) -> DistillerModel:
    """s3prl's ``DistillerModel`` of this size, its output layer an identity.

    The heads live apart (:mod:`.heads`), so "no task embedding, no output layer" is chosen, and
    with an identity in place of the output layer the model's ``pred`` is the encoder's output.
    """
    config = dataclasses.asdict(settings)
    # DistillerModel evaluates this text: it gets a literal written by us from checked numbers.
    config["extractor_conv_feature_layers"] = conv_layers_text(settings.conv_layers)
    config.update(task_emb_type="none", out_layer_type="none", n_tasks=1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it reports by print, and of heads it has not
        model = DistillerModel(DistillerConfig(config))
    logger.debug("%s", said.getvalue().strip())
    model.output_layer = nn.Identity()
    if model.post_extract_proj is None:
        model.encoder.register_forward_pre_hook(_own_input)
    return model


def _own_input(encoder: nn.Module, args: tuple) -> tuple:
    """The encoder's arguments, its input a copy.

    s3prl's encoder writes zeros over the padding in its input. Where the conv extractor is as wide
    as the layers, s3prl projects nothing and this input is the extractor's output, which autograd
    (``feature_grad_mult``) and the feature penalty need as it was.
    """
    return args[0].clone(), *args[1:]


class Student(nn.Module):
    """A small speech model: waveforms in, hidden states out.

    Args:
        settings: its size; see :class:`.settings.StudentSettings`.
    """

    def __init__(self, settings: StudentSettings):
        super().__init__()
        self.settings = settings
        self.backbone = build_backbone(settings)
        if settings.feature_grad_mult == 0:
            # s3prl runs the extractor without gradient then; so that nobody counts it as trained
            self.backbone.feature_extractor.requires_grad_(False)

    def forward(self, waves: Tensor, lengths: Tensor) -> StudentOutput:
        """Run the student.

        Args:
            waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
            lengths: ``[batch]``, valid samples of each waveform, ``settings.min_samples`` at least.
        """
        samples = torch.arange(waves.shape[1], device=waves.device)
        pad_mask = (samples[None] < lengths[:, None]).to(waves.dtype)  # [batch, sample]
        features, projected, last, mask, layers = self.backbone(waves, pad_mask, get_hidden=True)
        if self.backbone.post_extract_proj is None:  # a projection's padding is written over
            projected = projected.masked_fill(mask[..., None] == 0, 0.0)
        return StudentOutput(features, [projected, *layers], last.squeeze(1), mask)

    @property
    def width(self) -> int:
        """Dimensions of a hidden state."""
        return self.settings.encoder_embed_dim
