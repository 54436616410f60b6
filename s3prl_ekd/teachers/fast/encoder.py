"""Frozen HuBERT, wav2vec 2.0, WavLM, UniSpeech-SAT that compute only the hidden states asked for.

For s3prl's experts of these families, from a hub name or a checkpoint; every other upstream is
called as it is. The waveforms are prepared as the experts prepare them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import TeacherError, first_line
from . import conv as fast_conv
from . import layers as fast_layers
from .conv import ConvExtractor, same_weights
from .layers import Norm, PositionalConv, RelativeBias

if TYPE_CHECKING:
    from s3prl.upstream.hubert.hubert_model import HubertModel
    from s3prl.upstream.interfaces import UpstreamBase
    from s3prl.upstream.wav2vec2.wav2vec2_model import Wav2Vec2Model
    from s3prl.upstream.wavlm.WavLM import WavLM

logger = logging.getLogger(__name__)

_EPS = 1e-5  # of torch's layer_norm, by which s3prl normalises a waveform

_SECOND = 16_000  # samples
# What encoders of one batch hand to each other: waveforms and conv features by what makes them.
Shared = dict[tuple, Tensor]
_FAMILIES = {
    "s3prl.upstream.hubert.expert": "hubert",
    "s3prl.upstream.wav2vec2.expert": "wav2vec2",
    "s3prl.upstream.wavlm.expert": "wavlm",
    "s3prl.upstream.unispeech_sat.expert": "unispeech_sat",
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def normalised(waves: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each waveform brought to zero mean and unit variance over its valid samples.

    Args:
        waves: ``[batch, sample]``, 0 behind the end of each.
        lengths: valid samples of each.
    """
    count = torch.tensor(lengths, device=waves.device, dtype=waves.dtype)[:, None]
    valid = torch.arange(waves.shape[1], device=waves.device) < count  # [batch, sample]
    centred = (waves - waves.sum(1, keepdim=True) / count) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + _EPS)


def padded_frames(
    lengths: Sequence[int],
    samples: int,
    frames: int,
    conv: Sequence[tuple[int, int]] | None,
) -> list[int] | None:
    """How many frames of each utterance are valid, or None where nothing is padded.

    Args:
        lengths: valid samples of each.
        samples, frames: of the padded batch.
        conv: kernel and stride of each conv layer, for wav2vec 2.0, which counts the frames that a
            waveform of this length gives; None for HuBERT and WavLM, which cut the samples into as
            many equal blocks as there are frames and keep a block with any sound.
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
        # s3prl marks the last valid frame by its index: of none at all it marks the very last.
        counts.append(length if length > 0 else frames)
    return counts


@dataclass
class _Parts:
    """What is made of the model's weights for one device."""

    device: torch.device
    norm: Norm
    projection: tuple[Tensor, Tensor] | None
    positions: PositionalConv
    first_norm: Norm
    layers: list[fast_layers.Layer]
    bias: RelativeBias | None


class FastEncoder:
    """An upstream expert of s3prl, computed another way: the same hidden states.

    Args:
        model: the expert's model; see :func:`is_known`.
        extractor: its conv extractor; encoders of the same weights may have one in common.
        normalize: bring each waveform to zero mean and unit variance.
        counts_frames: reckon padding as wav2vec 2.0 does, not as HuBERT and WavLM.
        precision: what is computed in; hidden states come in float32 whatever it is.
        compiled: run the layers through ``torch.compile``.
        name: what messages call it.
    """

    def __init__(
        self,
        model: HubertModel | Wav2Vec2Model | WavLM,
        extractor: ConvExtractor,
        *,
        normalize: bool,
        counts_frames: bool,
        precision: torch.dtype = torch.float32,
        compiled: bool = False,
        name: str = "teacher",
    ):
        self.model = model
        self.extractor = extractor
        self.normalize = normalize
        self.counts_frames = counts_frames
        self.precision = precision
        self.name = name
        self._parts: _Parts | None = None
        self._told = False
        self._run_layer = _layer
        self.compiled = compiled
        if compiled:
            self._run_layer = torch.compile(_layer, dynamic=True)

    @torch.inference_mode()
    def hidden_states(
        self,
        waves: Tensor,
        lengths: Sequence[int],
        layers: Iterable[int],
        shared: Shared | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states by their number: 0 is the first layer's input, n the output of layer n.

        Args:
            waves: ``[batch, sample]`` at 16 kHz, 0 behind the end of each.
            lengths: valid samples of each, the longest of which is the batch's.
            layers: which are wanted; no layer above the highest is computed.
            shared: a dict, empty at first, that the teachers of one batch pass on.

        Returns:
            ``[batch, frame, dim]`` each, in float32: inference tensors, which must be copied (as
            by ``torch.stack``) before autograd may see them.
        """
        shared = {} if shared is None else shared
        wanted = set(layers)
        if self.precision != torch.float32 and not self._told:
            self._told = True
            self._tell_difference(waves, lengths, wanted)
        parts = self._on(waves.device)
        features = self._features(waves, lengths, shared)  # [batch, frame, channel]
        valid = padded_frames(
            lengths,
            waves.shape[1],
            features.shape[1],
            self.extractor.spec if self.counts_frames else None,
        )
        x = F.layer_norm(features, *parts.norm)
        if parts.projection is not None:
            x = F.linear(x, *parts.projection)
        keys = None
        if valid is not None:
            index = torch.arange(x.shape[1], device=x.device)
            padding = index >= torch.tensor(valid, device=x.device)[:, None]  # [batch, frame]
            x = x.masked_fill(padding[:, :, None], 0)
            keys = torch.zeros_like(padding, dtype=x.dtype).masked_fill_(padding, -torch.inf)
            keys = keys[:, None, None]
        x = parts.positions(x).add_(x)
        norm_first = self.model.encoder.layer_norm_first
        if not norm_first:
            x = F.layer_norm(x, *parts.first_norm)
        bias = None if parts.bias is None else parts.bias(x.shape[1])
        states = {0: x} if 0 in wanted else {}
        for number, layer in enumerate(parts.layers[: max(wanted)], 1):
            x = self._layer(layer, x, bias, keys)
            if number in wanted:
                states[number] = x
        if norm_first and len(parts.layers) in states:
            # s3prl takes the last one behind the encoder's final norm.
            states[len(parts.layers)] = F.layer_norm(x, *parts.first_norm)
        return {number: state.float() for number, state in states.items()}

    def _features(self, waves: Tensor, lengths: Sequence[int], shared: Shared) -> Tensor:
        key = ("features", id(self.extractor), self.normalize)
        if key not in shared:
            if self.normalize:
                ready = ("normalised",)
                if ready not in shared:
                    shared[ready] = normalised(waves, lengths)
                waves = shared[ready]
            shared[key] = self.extractor(waves)
        return shared[key].to(self.precision)

    def _tell_difference(self, waves: Tensor, lengths: Sequence[int], layers: set[int]) -> None:
        """Log once how far a lower precision is from float32, over a second of sound."""
        length = min(lengths[0], _SECOND)
        waves = waves[:1, :length]
        exact = FastEncoder(
            self.model,
            ConvExtractor(self.extractor.module),
            normalize=self.normalize,
            counts_frames=self.counts_frames,
        ).hidden_states(waves, [length], layers)
        ours = self.hidden_states(waves, [length], layers)
        away = sum((ours[n] - exact[n]).abs().mean() / exact[n].abs().mean() for n in layers)
        logger.info(
            "teacher %s: %s targets differ from float32 by %.3f %% of their mean size",
            self.name,
            str(self.precision).removeprefix("torch."),
            100 * float(away) / len(layers),
        )

    def _layer(
        self, layer: fast_layers.Layer, x: Tensor, bias: Tensor | None, keys: Tensor | None
    ) -> Tensor:
        if not self.compiled:
            return layer(x, bias, keys)
        try:
            return self._run_layer(layer, x, bias, keys)
        except Exception as error:  # no compiler, or one that does not fit: torch raises all sorts
            raise TeacherError(
                f"teachers.{self.name}: torch.compile does not work here ({first_line(error)}); "
                "set teacher_compile: false"
            ) from None

    def _on(self, device: torch.device) -> _Parts:
        """The weights on the device of a batch, made at the first one."""
        if self._parts is None or self._parts.device != device:
            model, encoder = self.model, self.model.encoder

            def take(tensor: Tensor) -> Tensor:
                return tensor.detach().to(device, self.precision)

            def norm(layer: nn.LayerNorm) -> Norm:
                return layer.normalized_shape, take(layer.weight), take(layer.bias), layer.eps

            projection = model.post_extract_proj
            attention = encoder.layers[0].self_attn
            relative = getattr(attention, "has_relative_attention_bias", False)
            # Some of these tensors become the module's parameters: plain tensors, not inference's.
            with torch.inference_mode(False), torch.no_grad():
                self._parts = _Parts(
                    device,
                    norm(model.layer_norm),
                    (take(projection.weight), take(projection.bias)) if projection else None,
                    PositionalConv(encoder.pos_conv, device, self.precision),
                    norm(encoder.layer_norm),
                    [fast_layers.Layer(layer, device, self.precision) for layer in encoder.layers],
                    RelativeBias(attention, device, self.precision) if relative else None,
                )
        return self._parts


def _layer(layer: fast_layers.Layer, x: Tensor, bias: Tensor | None, keys: Tensor | None) -> Tensor:
    return layer(x, bias, keys)


def is_known(model: HubertModel | Wav2Vec2Model | WavLM) -> bool:
    """Whether a model is built as :class:`FastEncoder` computes it; others take the plain path."""
    encoder: Any = getattr(model, "encoder", None)
    positions = getattr(encoder, "pos_conv", None)
    if type(encoder).__name__ != "TransformerEncoder" or not isinstance(positions, nn.Sequential):
        return False
    usual = len(positions) == 3 and type(positions[0]) is nn.Conv1d
    usual = usual and type(positions[2]) is nn.GELU
    odd = getattr(model, "input_quantizer", None) is not None
    odd = odd or getattr(model, "crop_seq_to_multiple", 1) != 1
    return (
        usual
        and not odd
        and len(encoder.layers) > 0
        and fast_conv.is_known(model.feature_extractor)
        and all(fast_layers.is_known(layer) for layer in encoder.layers)
    )


def family(upstream: UpstreamBase) -> str | None:
    """The family of an upstream that can be computed fast, or None."""
    kind = type(upstream)
    name = _FAMILIES.get(kind.__module__) if kind.__name__ == "UpstreamExpert" else None
    if name is None or not is_known(upstream.model):
        return None
    if name == "wav2vec2":  # two switches of its expert, which nobody of ours turns
        usual = upstream.apply_padding_mask and not upstream.numpy_wav_normalize
        if not usual or upstream.feature_selection is not None:
            return None
    return name


def normalizes(upstream: UpstreamBase) -> bool:
    """Whether an expert of :func:`family` brings waveforms to zero mean and unit variance."""
    if hasattr(upstream, "wav_normalize"):
        return bool(upstream.wav_normalize)
    settings = upstream.task_cfg if hasattr(upstream, "task_cfg") else upstream.cfg
    return bool(settings.normalize)


def fast_encoders(
    upstreams: Mapping[str, UpstreamBase], precision: str = "float32", compiled: bool = False
) -> dict[str, FastEncoder]:
    """An encoder for each upstream that can have one; extractors of the same weights are one.

    Args:
        upstreams: by teacher name.
        precision: one of :data:`PRECISIONS`.
        compiled: run the layers through ``torch.compile``.
    """
    extractors: list[ConvExtractor] = []
    encoders = {}
    for name, upstream in upstreams.items():
        kind = family(upstream)
        if kind is None:
            logger.info("teacher %s: plain path, in float32 (%s)", name, type(upstream).__module__)
            continue
        module = upstream.model.feature_extractor
        extractor = next((e for e in extractors if same_weights(e.module, module)), None)
        if extractor is None:
            extractor = ConvExtractor(module, PRECISIONS[precision])
            extractors.append(extractor)
        encoders[name] = FastEncoder(
            upstream.model,
            extractor,
            normalize=normalizes(upstream),
            counts_frames=kind == "wav2vec2",
            precision=PRECISIONS[precision],
            compiled=compiled,
            name=name,
        )
    if len(extractors) < len(encoders):
        logger.info("%d teachers, %d different conv extractors", len(encoders), len(extractors))
    return encoders
