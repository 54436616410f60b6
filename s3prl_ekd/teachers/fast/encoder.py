"""Fast inference for frozen HuBERT, wav2vec 2.0, WavLM and UniSpeech-SAT teachers.

Layers above the highest target are not computed. This supports s3prl's experts of these families,
from a hub name or a checkpoint, and prepares the waveforms as they do. All other upstreams run
their own forward.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...distill.conv_extractor import ConvExtractor, Shared, supports_blocks
from ...errors import TeacherError, first_line
from ...system.precision import DTYPES
from .layers import Converter, FastLayer, PositionalConv, RelativeBias, supports_layer

if TYPE_CHECKING:
    from s3prl.upstream.hubert.hubert_model import HubertModel
    from s3prl.upstream.interfaces import UpstreamBase
    from s3prl.upstream.wav2vec2.wav2vec2_model import Wav2Vec2Model
    from s3prl.upstream.wavlm.WavLM import WavLM

logger = logging.getLogger(__name__)

_ONE_SECOND = 16_000  # samples
LARGEST_ERROR = 0.2  # of half precision; that of the tiny teachers in bfloat16 is 0.01
_FAMILIES = {
    "s3prl.upstream.hubert.expert": "hubert",
    "s3prl.upstream.wav2vec2.expert": "wav2vec2",
    "s3prl.upstream.wavlm.expert": "wavlm",
    "s3prl.upstream.unispeech_sat.expert": "unispeech_sat",
}
PRECISIONS = {"float32": torch.float32, **DTYPES}


def padded_frames(
    lengths: Sequence[int],
    samples: int,
    frames: int,
    conv: Sequence[tuple[int, int]] | None,
) -> list[int] | None:
    """Number of valid frames of each utterance, or None without padding.

    Args:
        lengths: valid samples of each utterance.
        samples, frames: of the padded batch.
        conv: for wav2vec 2.0, kernel and stride of each conv layer; s3prl counts the frames that
            the unpadded waveform has. None for HuBERT and WavLM: s3prl divides the samples into
            one block per frame, all equal, and a block with at least one valid sample is valid.
    """
    if all(length == samples for length in lengths):
        return None
    if conv is None:
        block = samples // frames
        return [min(-(-length // block), frames) for length in lengths]
    counts = []
    for length in lengths:
        for kernel, stride in conv:
            length = (length - kernel) // stride + 1
        # s3prl marks the last valid frame by index; without one, index -1 is the batch's last frame
        counts.append(length if length > 0 else frames)
    return counts


class _Weights:
    """The model's weights, converted for one device."""

    def __init__(self, model: HubertModel | Wav2Vec2Model | WavLM, convert: Converter):
        encoder, projection = model.encoder, model.post_extract_proj
        self.device = convert.device
        self.norm = convert.norm(model.layer_norm)
        self.projection = convert.linear(projection) if projection else None
        self.positions = PositionalConv(encoder.pos_conv, convert)
        self.encoder_norm = convert.norm(encoder.layer_norm)
        self.layers = [FastLayer(layer, convert) for layer in encoder.layers]
        attention = encoder.layers[0].self_attn
        relative = getattr(attention, "has_relative_attention_bias", False)
        self.bias = RelativeBias(attention, convert) if relative else None


class FastEncoder:
    """Computes the hidden states of an s3prl upstream expert faster.

    Args:
        upstream: the expert, of a :func:`family` that is supported.
        extractor: its conv extractor, in the precision of the computation; encoders with the same
            conv weights may share one. Hidden states are always float32.
        compiled: run the layers through ``torch.compile``.
        name: the teacher's name, for messages.
    """

    def __init__(
        self,
        upstream: UpstreamBase,
        extractor: ConvExtractor,
        compiled: bool = False,
        name: str = "teacher",
    ):
        self.upstream = upstream
        self.model: HubertModel | Wav2Vec2Model | WavLM = upstream.model
        self.extractor = extractor
        self.precision = extractor.dtype or torch.float32
        self.normalize = normalizes(upstream)
        # See padded_frames. With masked_norm a frame that is partly padding counts as padding: its
        # value depends on the amount of padding. s3prl's HuBERT and WavLM count it as valid.
        self.counts_frames = family(upstream) == "wav2vec2" or extractor.masked_norm
        self.name = name
        self._weights: _Weights | None = None
        self._precision_logged = self.precision == torch.float32
        self.compiled = compiled
        self._run = torch.compile(_run, dynamic=True) if compiled else _run

    @torch.inference_mode()
    def hidden_states(
        self,
        waves: Tensor,
        lengths: Sequence[int],
        layers: Iterable[int],
        shared: Shared | None = None,
    ) -> dict[int, Tensor]:
        """Compute hidden states; see :class:`~s3prl_ekd.distill.teachers.TeacherEncoder`.

        They are inference tensors: copy them (as ``torch.stack`` does) before using them with
        autograd.
        """
        shared = {} if shared is None else shared
        indices = set(layers)
        if not self._precision_logged:
            self._precision_logged = True
            self._check_precision(waves, lengths, indices)
        weights = self._weights_on(waves.device)
        features = self.extractor.shared_features(  # [batch, frame, channel]
            waves, torch.tensor(lengths), self.normalize, shared
        )
        conv = self.extractor.spec if self.counts_frames else None
        valid = padded_frames(lengths, waves.shape[1], features.shape[1], conv)
        x = F.layer_norm(features, *weights.norm)
        if weights.projection is not None:
            x = F.linear(x, *weights.projection)
        key_mask = None
        if valid is not None:
            frames = torch.arange(x.shape[1], device=x.device)
            counts = torch.tensor(valid).to(x.device, non_blocking=True)
            padding = frames >= counts[:, None]  # [batch, frame]
            x = x.masked_fill(padding[:, :, None], 0)
            key_mask = torch.zeros_like(padding, dtype=x.dtype).masked_fill_(padding, -torch.inf)
            key_mask = key_mask[:, None, None]
        x = weights.positions(x).add_(x)
        norm_first = self.model.encoder.layer_norm_first
        if not norm_first:
            x = F.layer_norm(x, *weights.encoder_norm)
        bias = None if weights.bias is None else weights.bias(x.shape[1])
        states = {0: x} if 0 in indices else {}
        for index, layer in enumerate(weights.layers[: max(indices)], 1):
            x = self._apply(layer, x, bias, key_mask)
            if index in indices:
                states[index] = x
        if norm_first and len(weights.layers) in states:
            # s3prl's last hidden state is after the encoder's final norm.
            states[len(weights.layers)] = F.layer_norm(x, *weights.encoder_norm)
        return {index: state.float() for index, state in states.items()}

    def _check_precision(self, waves: Tensor, lengths: Sequence[int], layers: set[int]) -> None:
        """Log the error of a lower precision relative to float32, over one second of audio.

        Raises:
            TeacherError: it is larger than rounding explains.
        """
        length = min(lengths[0], _ONE_SECOND)
        waves = waves[:1, :length]
        extractor = ConvExtractor(self.extractor.module, torch.float32, self.extractor.masked_norm)
        exact_encoder = FastEncoder(self.upstream, extractor)
        exact = exact_encoder.hidden_states(waves, [length], layers)
        rounded = self.hidden_states(waves, [length], layers)
        errors = [(rounded[n] - exact[n]).abs().mean() / exact[n].abs().mean() for n in layers]
        error = float(sum(errors)) / len(layers)
        message = (
            f"teachers.{self.name}: targets in {str(self.precision).removeprefix('torch.')} differ "
            f"from those in float32 by {100 * error:.3f} % of their mean absolute value"
        )
        logger.info(message)
        if not error <= LARGEST_ERROR:
            raise TeacherError(f"{message}; set teacher_precision: float32")

    def _apply(
        self, layer: FastLayer, x: Tensor, bias: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        try:
            return self._run(layer, x, bias, key_mask)
        except Exception as error:
            if not self.compiled:
                raise
            # A missing or unsuitable compiler: torch raises various classes.
            raise TeacherError(
                f"teachers.{self.name}: torch.compile failed ({first_line(error)}); set "
                "teacher_compile: false"
            ) from None

    def _weights_on(self, device: torch.device) -> _Weights:
        """The weights on ``device``, converted at the first call."""
        if self._weights is None or self._weights.device != device:
            # Some of these tensors become the module's parameters, so they must not be inference
            # tensors.
            with torch.inference_mode(False), torch.no_grad():
                self._weights = _Weights(self.model, Converter(device, self.precision))
        return self._weights


def _run(layer: FastLayer, x: Tensor, bias: Tensor | None, key_mask: Tensor | None) -> Tensor:
    return layer(x, bias, key_mask)


def supports_encoder(model: HubertModel | Wav2Vec2Model | WavLM) -> bool:
    """Whether :class:`FastEncoder` can compute this model."""
    encoder: Any = getattr(model, "encoder", None)
    positions = getattr(encoder, "pos_conv", None)
    if type(encoder).__name__ != "TransformerEncoder" or not isinstance(positions, nn.Sequential):
        return False
    return (
        len(positions) == 3
        and type(positions[0]) is nn.Conv1d
        and type(positions[2]) is nn.GELU
        and getattr(model, "input_quantizer", None) is None
        and getattr(model, "crop_seq_to_multiple", 1) == 1
        and len(encoder.layers) > 0
        and supports_blocks(model.feature_extractor)
        and all(supports_layer(layer) for layer in encoder.layers)
    )


def family(upstream: UpstreamBase) -> str | None:
    """The family of an upstream that :class:`FastEncoder` supports, or None."""
    cls = type(upstream)
    name = _FAMILIES.get(cls.__module__) if cls.__name__ == "UpstreamExpert" else None
    if name is None or not supports_encoder(upstream.model):
        return None
    if name == "wav2vec2":  # these options of its expert must have their defaults
        usual = upstream.apply_padding_mask and not upstream.numpy_wav_normalize
        if not usual or upstream.feature_selection is not None:
            return None
    return name


def normalizes(upstream: UpstreamBase) -> bool:
    """Whether an expert of :func:`family` normalises waveforms to zero mean and unit variance."""
    if hasattr(upstream, "wav_normalize"):
        return bool(upstream.wav_normalize)
    settings = upstream.task_cfg if hasattr(upstream, "task_cfg") else upstream.cfg
    return bool(settings.normalize)


def fast_encoders(
    upstreams: Mapping[str, UpstreamBase],
    precision: str = "float32",
    compiled: bool = False,
    masked_norm: bool = False,
) -> dict[str, FastEncoder]:
    """Build an encoder for each supported upstream; equal conv extractors are shared.

    ``precision`` is one of :data:`PRECISIONS`; ``compiled`` runs the layers through
    ``torch.compile``; ``masked_norm``: see :class:`~...distill.conv_extractor.ConvExtractor`.
    """
    extractors: dict[bytes, ConvExtractor] = {}
    encoders = {}
    for name, upstream in upstreams.items():
        if family(upstream) is None:
            logger.info(
                "teacher %s: not supported by the fast backend, using its own forward in float32 "
                "(%s)",
                name,
                type(upstream).__module__,
            )
            continue
        module = upstream.model.feature_extractor
        extractor = ConvExtractor(module, PRECISIONS[precision], masked_norm, frozen=True)
        extractor = extractors.setdefault(extractor.digest(), extractor)
        encoders[name] = FastEncoder(upstream, extractor, compiled, name)
    if len(extractors) < len(encoders):
        logger.info("%d teachers share %d conv extractors", len(encoders), len(extractors))
    return encoders
