"""The student: s3prl's ``DistillerModel`` without heads, or a copied HuBERT or WavLM, with our
forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel
from torch import Tensor, nn

from .conv_extractor import ConvExtractor, Shared, supports_blocks
from .conv_layers import conv_layers_text
from .copying import make_copyable
from .student_forward import StudentOutput, conv_frames, encode, extract, student_forward
from .student_settings import Architecture, PrunedSettings, StartDrop, StudentSettings

if TYPE_CHECKING:
    from .pruning.backbone import PrunedBackbone

logger = logging.getLogger(__name__)


def build_backbone(settings: StudentSettings) -> DistillerModel:
    """Build s3prl's ``DistillerModel`` without task embedding and heads: its ``pred`` is the
    encoder's output."""
    config = dataclasses.asdict(settings)
    # DistillerModel evaluates this text, so it gets a literal written from checked numbers.
    config["extractor_conv_feature_layers"] = conv_layers_text(settings.conv_layers)
    config.update(task_emb_type="none", out_layer_type="none", n_tasks=1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # it prints its settings, including those of heads
        model = DistillerModel(DistillerConfig(config))
    logger.debug("%s", printed.getvalue().strip())
    model.output_layer = nn.Identity()
    return model


class Student(nn.Module):
    """A small speech model: waveforms in, hidden states out.

    Args:
        settings: size and regularisation.
        backend: ``ours`` runs :mod:`.student_forward`, ``s3prl`` the forward pass of s3prl's
            model; their outputs and gradients are equal except for rounding and random draws.
        start_drop: of the gates at the start, for a student with gates.

    Attributes:
        activation_checkpointing: whether our forward recomputes activations in the backward pass;
            False until it is set.
    """

    def __init__(
        self,
        settings: Architecture,
        backend: Literal["ours", "s3prl"] = "ours",
        start_drop: StartDrop | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.backend = backend
        self.activation_checkpointing = False
        self.extract, self.encode = self.fast_extract, encode
        self.backbone: DistillerModel | PrunedBackbone
        if isinstance(settings, PrunedSettings):
            from .pruning.backbone import PrunedBackbone

            self.backbone = PrunedBackbone(settings, start_drop)
        else:
            self.backbone = build_backbone(settings)
        make_copyable(self.backbone)
        extractor = self.backbone.feature_extractor
        self.conv: ConvExtractor | None = None
        if supports_blocks(extractor):
            self.conv = ConvExtractor(extractor, masked_norm=settings.masked_norm)
        self.backbone.masked_norm = settings.masked_norm  # for student_forward
        if settings.feature_grad_mult == 0:
            self.freeze_extractor()

    def freeze_extractor(self) -> None:
        """Train no parameter of the conv extractor."""
        self.backbone.feature_extractor.requires_grad_(False)

    def forward(
        self,
        waves: Tensor,
        lengths: Tensor,
        masked: tuple[Tensor, Tensor] | None = None,
        features: Tensor | None = None,
    ) -> StudentOutput:
        """Run the student.

        Args:
            waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
            lengths: ``[batch]``, valid samples of each waveform, at least ``settings.min_samples``.
            masked: masked frames and the vector that replaces them, see :func:`.student_forward`.
            features: the result of :meth:`frozen_features`.
        """
        if self.backend == "s3prl":
            return s3prl_forward(self.backbone, waves, lengths)
        if not self.is_cut:
            self.backbone.draw_gates()
        known = not torch.compiler.is_compiling() and lengths.device.type == "cpu"
        return student_forward(
            self.backbone,
            waves,
            lengths,
            draw_layers(self.backbone.encoder),
            self.activation_checkpointing,
            masked,
            not known or bool((lengths < waves.shape[1]).any()),
            self.extract if features is None else partial(_given, features),
            self.encode,
        )

    @torch.no_grad()
    def frozen_features(self, waves: Tensor, lengths: Tensor, shared: Shared) -> Tensor | None:
        """The features ``[batch, frame, channel]`` of a frozen conv extractor; None if it is
        trained, or run in another way.

        Args:
            waves, lengths: see :meth:`forward`.
            shared: the features are added, for teachers with the same weights.
        """
        extractor = self.backbone.feature_extractor
        trained = any(weight.requires_grad for weight in extractor.parameters())
        if trained or self.conv is None or self.backend == "s3prl" or self._drops_features:
            return None
        normalize = self.settings.normalize_waveforms
        return self.conv.shared_features(waves, lengths, normalize, shared)

    @property
    def _drops_features(self) -> bool:
        """Whether there is dropout within the conv extractor."""
        return self.training and getattr(self.settings, "extractor_dropout", 0.0) > 0

    def fast_extract(
        self,
        blocks: Iterable[Any],
        waves: Tensor,
        lengths: Tensor,
        recompute: bool,
        masked_norm: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``student_forward.extract`` by ``conv_extractor.ConvExtractor``, which stores
        few activations in any case; as a sequence of modules while compiling, with dropout, for
        gradients of the waveforms, and on MPS, which lacks float64."""
        gradients = waves.requires_grad and torch.is_grad_enabled()
        unusual = self._drops_features or gradients or waves.device.type == "mps"
        if self.conv is None or unusual or torch.compiler.is_compiling():
            return extract(blocks, waves, lengths, recompute, masked_norm)
        return self.conv(waves, lengths.cpu()), conv_frames(blocks, lengths)

    def train(self, mode: bool = True) -> Student:
        """Set train or eval mode."""
        if self.conv is not None:
            self.conv.forget_weights()  # for digest(): an optimizer may change weights unnoticed
        return super().train(mode)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile extractor and encoder, with the arguments of ``torch.compile``.

        They become two graphs: in a single graph, the number of frames is a symbolic expression of
        the number of samples, and Inductor cannot sort strides that contain it.
        """
        if self.backend == "s3prl":
            super().compile(*args, **kwargs)
        else:
            self.extract = torch.compile(extract, *args, **kwargs)
            self.encode = torch.compile(encode, *args, **kwargs)

    @property
    def is_cut(self) -> bool:
        """Whether the student has no gates: its size is final."""
        return getattr(self.settings, "gates", None) is None

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.settings.encoder_embed_dim


def _given(
    features: Tensor, blocks: Iterable[Any], waves: Tensor, lengths: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """:func:`.student_forward.extract`, with its features given."""
    return features, conv_frames(blocks, lengths)


def draw_layers(encoder: Any) -> list[nn.Module]:
    """Draw the transformer layers of a forward pass: in training, layer drop skips some."""
    if not encoder.training or not encoder.layerdrop:
        return list(encoder.layers)
    return [layer for layer in encoder.layers if np.random.random() > encoder.layerdrop]


def s3prl_forward(backbone: DistillerModel, waves: Tensor, lengths: Tensor) -> StudentOutput:
    """Run s3prl's own forward; the result is that of :func:`.student_forward.student_forward`.

    Where the conv extractor is as wide as the transformer layers, s3prl overwrites the padding of
    the extractor's output in place, which autograd rejects unless ``feature_grad_mult`` is 0 or 1.
    """
    samples = torch.arange(waves.shape[1], device=waves.device)
    lengths = lengths.to(waves.device, non_blocking=True)
    pad_mask = (samples[None] < lengths[:, None]).to(waves.dtype)  # [batch, sample]
    features, projected, last, mask, layers = backbone(waves, pad_mask, get_hidden=True)
    return StudentOutput(features, [projected, *layers], last.squeeze(1), mask)
