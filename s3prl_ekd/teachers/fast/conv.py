"""The conv extractor of HuBERT, wav2vec 2.0 and WavLM as matrix products over frames.

The extractor takes about half of a Base teacher's time. Three changes make it faster:

- Frames are stored as rows, ``[frame, channel]``. A convolution of stride s is then a few matrix
  products on views of its input, s taps each, without copies.
- On a CPU, the first two layers, which have the most frames, are computed in chunks that fit in the
  processor's cache.
- The group norm after the first convolution is an affine map of each channel. Its mean and variance
  follow from those of the waveform's frames, so it is folded into the convolution's weights, one
  set for each utterance. They include padding, as in s3prl, unless ``masked_norm`` is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # WavLM has a class of the same name
    from s3prl.upstream.wav2vec2.wav2vec2_model import ConvFeatureExtractionModel

_CHUNK = 1024  # frames of the second layer per chunk and thread: 4 MB of its input


@dataclass(frozen=True)
class _ConvLayer:
    """One conv layer: ``weight`` ``[kernel, in, out]``, ``bias`` or None, a layer norm or None."""

    weight: Tensor
    bias: Tensor | None
    norm: nn.LayerNorm | None
    stride: int

    @property
    def kernel(self) -> int:
        return self.weight.shape[0]

    def frames(self, count: int) -> int:
        """Output frames for ``count`` input frames."""
        return (count - self.kernel) // self.stride + 1


class ConvExtractor:
    """Computes conv features of waveforms, with the weights of s3prl's module.

    Args:
        module: see :func:`supports_conv`.
        dtype: of the computation.
        masked_norm: take the statistics of the group norm over valid frames only (*ours*).
    """

    def __init__(
        self,
        module: ConvFeatureExtractionModel,
        dtype: torch.dtype = torch.float32,
        masked_norm: bool = False,
    ):
        self.module = module
        self.dtype = dtype
        self.masked_norm = masked_norm
        self._device: torch.device | None = None  # of `_layers`
        self._layers: list[_ConvLayer] = []
        self._group_norm: nn.GroupNorm | None = None

    @property
    def spec(self) -> list[tuple[int, int]]:
        """Kernel and stride of each layer."""
        convs = [layer[0] for layer in self.module.conv_layers]
        return [(conv.kernel_size[0], conv.stride[0]) for conv in convs]

    def __call__(self, waves: Tensor, lengths: Sequence[int]) -> Tensor:
        """``[batch, sample]`` -> ``[batch, frame, channel]``; ``lengths``: valid samples."""
        masked = self.masked_norm and min(lengths) < waves.shape[1]
        if self._cudnn_is_faster(waves) and not masked:
            return self.module(waves).transpose(1, 2)
        if self._device != waves.device:
            self._prepare(waves.device)
        first, *rest = self._layers
        frames = waves.unfold(1, first.kernel, first.stride)  # [batch, frame, tap]
        valid = None
        if masked:
            counts = torch.tensor([first.frames(length) for length in lengths])
            valid = (torch.arange(frames.shape[1]) < counts[:, None]).to(waves.device)
        weight, bias = _first_weights(first, self._group_norm, frames, valid)
        weight, bias = weight.to(self.dtype), bias.to(self.dtype)
        if waves.device.type == "cpu" and rest:
            hidden = _two_layers(frames, weight, bias, first.norm, rest.pop(0))
        else:
            hidden = torch.baddbmm(bias[:, None], frames.to(self.dtype), weight)
            hidden = _activate(hidden, first.norm)
        for layer in rest:
            hidden = _activate(_convolve(hidden, layer), layer.norm)
        return hidden

    def _cudnn_is_faster(self, waves: Tensor) -> bool:
        """Whether TF32 is allowed in cuDNN's convolutions and not in matrix products."""
        if waves.device.type != "cuda" or self.dtype != torch.float32:
            return False
        try:
            return torch.backends.cudnn.allow_tf32 > torch.backends.cuda.matmul.allow_tf32
        except RuntimeError:  # torch 2.9 and later, if these were set by their new names
            return True

    def _prepare(self, device: torch.device) -> None:
        layers = []
        # Some of these tensors become the module's parameters, so they must not be inference
        # tensors.
        with torch.inference_mode(False), torch.no_grad():
            for index, layer in enumerate(self.module.conv_layers):
                conv, norm = layer[0], _norm(layer)
                if isinstance(norm, nn.GroupNorm):
                    self._group_norm, norm = norm, None
                dtype = self.dtype if index else torch.float32
                weight = _by_taps(conv.weight, dtype, device)
                bias = None if conv.bias is None else conv.bias.detach().to(dtype)
                layers.append(_ConvLayer(weight, bias, norm, conv.stride[0]))
        self._device, self._layers = device, layers


def supports_conv(module: ConvFeatureExtractionModel) -> bool:
    """Whether :class:`ConvExtractor` can compute this module."""
    layers: Any = getattr(module, "conv_layers", None)
    if not isinstance(layers, nn.ModuleList):
        return False
    if getattr(module, "conv_type", "default") != "default":
        return False
    for index, layer in enumerate(layers):
        if not isinstance(layer, nn.Sequential) or type(layer[0]) is not nn.Conv1d:
            return False
        conv, norm = layer[0], _norm(layer)
        simple = (conv.padding, conv.dilation, conv.groups) == ((0,), (1,), 1)
        if not simple or type(layer[-1]) is not nn.GELU or layer[-1].approximate != "none":
            return False
        if isinstance(norm, nn.GroupNorm) and (index or norm.num_groups != conv.out_channels):
            return False
    first: Any = layers[0]
    return first[0].in_channels == 1


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two extractors have the same layers and weights."""
    a, b = first.state_dict(), second.state_dict()
    if a.keys() != b.keys() or str(first) != str(second):
        return False
    return all(torch.equal(a[name], b[name].to(a[name])) for name in a)


def _norm(layer: nn.Sequential) -> nn.LayerNorm | nn.GroupNorm | None:
    """The norm of one conv layer; s3prl wraps a layer norm in two transpositions."""
    types = (nn.GroupNorm, nn.LayerNorm)
    return next((module for module in layer.modules() if isinstance(module, types)), None)


def _by_taps(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Convert ``[out, in, kernel]`` to a contiguous ``[kernel, in, out]``.

    If dtype and device stay the same, the parameter becomes a view of the result, so that memory
    holds one copy of the weights.
    """
    weight = parameter.detach().permute(2, 1, 0).to(device, dtype).contiguous()
    if dtype == parameter.dtype and device == parameter.device:
        parameter.data = weight.permute(2, 1, 0)
    return weight


def _first_weights(
    layer: _ConvLayer, norm: nn.GroupNorm | None, frames: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight ``[batch, tap, channel]`` and bias ``[batch, channel]`` of the first layer.

    The group norm is folded in. For weights w, the mean over time of w·x is w·mean(x), and its
    variance is wᵀ·cov(x)·w. ``valid``: bool ``[batch, frame]``, the frames of these statistics;
    None: all.
    """
    batch = frames.shape[0]
    weight = layer.weight[:, 0]  # [tap, channel]
    bias = weight.new_zeros(weight.shape[1]) if layer.bias is None else layer.bias
    if norm is None:
        return weight.expand(batch, -1, -1), bias.expand(batch, -1)
    # float64: the variance is a small difference of large sums
    if valid is None:
        mean = frames.mean(1, keepdim=True, dtype=torch.float64)  # [batch, 1, tap]
        centred = frames - mean
        covariance = centred.transpose(1, 2) @ centred / frames.shape[1]  # [batch, tap, tap]
    else:
        share = valid[..., None].double()
        count = share.sum(1, keepdim=True)
        mean = (frames * share).sum(1, keepdim=True) / count
        centred = (frames - mean) * share
        covariance = centred.transpose(1, 2) @ centred / count
    exact = weight.double()
    variance = ((covariance @ exact) * exact).sum(1)  # [batch, channel]
    scale = norm.weight / torch.sqrt(variance + norm.eps)  # the conv's bias cancels with the mean
    shift = norm.bias - (mean @ exact).squeeze(1) * scale
    return (exact * scale[:, None]).float(), shift.float()


def _two_layers(
    frames: Tensor, weight: Tensor, bias: Tensor, norm: nn.LayerNorm | None, second: _ConvLayer
) -> Tensor:
    """Compute the first two layers of each utterance in chunks: ``[batch, frame, channel]``."""
    chunk = _CHUNK * torch.get_num_threads()
    count = second.frames(frames.shape[1])
    out = weight.new_empty(frames.shape[0], count, second.weight.shape[2])
    for utterance in range(frames.shape[0]):
        for begin in range(0, count, chunk):
            end = min(begin + chunk, count)
            rows = slice(begin * second.stride, (end - 1) * second.stride + second.kernel)
            taps = frames[utterance, rows].to(weight.dtype)
            hidden = torch.addmm(bias[utterance], taps, weight[utterance])
            hidden = _activate(hidden, norm)
            result = _convolve(hidden[None], second, out[utterance : utterance + 1, begin:end])
            if second.norm is None:
                torch.ops.aten.gelu_(result)
            else:
                result.copy_(_activate(result, second.norm))
    return out


def _convolve(hidden: Tensor, layer: _ConvLayer, out: Tensor | None = None) -> Tensor:
    """``[batch, frame, in]`` -> ``[batch, frame, out]``, one product for each ``stride`` taps."""
    batch, count, channels = hidden.shape
    frames = layer.frames(count)
    if out is None:
        out = hidden.new_empty(batch, frames, layer.weight.shape[2])
    for tap in range(0, layer.kernel, layer.stride):
        taps = layer.weight[tap : tap + layer.stride]  # [tap, in, out]
        # Row t is a view of len(taps) consecutive frames, from frame t * stride + tap on.
        size = (batch, frames, taps.shape[0] * channels)
        strides = (hidden.stride(0), layer.stride * channels, 1)
        start = hidden.storage_offset() + tap * channels
        rows = hidden.as_strided(size, strides, start)
        matrix = taps.reshape(1, -1, taps.shape[2]).expand(batch, -1, -1)
        if tap == 0:
            torch.bmm(rows, matrix, out=out)
        else:
            out.baddbmm_(rows, matrix)
    return out if layer.bias is None else out.add_(layer.bias)


def _activate(hidden: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """Apply the layer norm, if any, and then GELU in place."""
    if norm is not None:
        weight, bias = norm.weight.to(hidden.dtype), norm.bias.to(hidden.dtype)
        hidden = F.layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps)
    return torch.ops.aten.gelu_(hidden)
